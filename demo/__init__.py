"""
The module at work under a real orchestrator, on one machine and with nothing prepared.

``run.py`` is the program. The other files are of use to tests and benchmarks too: they start an
orchestrator of one's own (``services``), deploy a project with it and read what it logged
(``orchestrator``), and end whatever was started (``processes``).
"""

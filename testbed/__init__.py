"""
What the demo, the tests and the benchmarks share: a database, an orchestrator and its client, and
environments to install this module in, all of which end with the program that started them.
"""

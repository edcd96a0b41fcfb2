"""The module at work under a real orchestrator, on one machine and with nothing prepared."""

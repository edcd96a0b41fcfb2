"""
Fixtures for all tests.
"""

# Installed, this module has it loaded already; a bare checkout has not.
pytest_plugins = ["pytest_inmanta_mitogen"]

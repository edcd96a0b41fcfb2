"""This module against the published one and other ways to reach hosts: ``make bench``."""

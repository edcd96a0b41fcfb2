"""What hosts log, and what they print: forwarded to the agent's log, within bounds."""

import logging

from inmanta_plugins.mitogen.hosts.streams import Allowance
from inmanta_plugins.mitogen.settings import (
    LOG_BURST,
    LOG_RATE,
    LOG_RESUME,
    LONGEST_LOGGER_NAME,
    LONGEST_RECORD,
)
from inmanta_plugins.mitogen.texts import bounded_text

LOGGER = logging.getLogger("inmanta_plugins.mitogen.host")
"""Gets what hosts log, at the level they log it at."""


class ForwardedLog:
    """The log records of all hosts, each host with an allowance of its own."""

    def __init__(self) -> None:
        self._allowances: dict[int, Allowance] = {}
        self._dropped: dict[int, int] = {}

    def log(self, host: int, name: str, data: bytes) -> None:
        """
        :param host: The id of the context next to the agent.
        :param name: What people know it by.
        :param data: What it sent: the name of its logger, the level and the text.
        """
        if host not in self._allowances:
            self._allowances[host] = Allowance(LOG_BURST, LOG_RATE)
        allowance = self._allowances[host]
        if (host in self._dropped and allowance.left < LOG_RESUME) or not allowance.take():
            dropped = self._dropped[host] = self._dropped.get(host, 0) + 1
            if dropped == 1:
                LOGGER.warning("%s: logs more than %d records a second: dropped.", name, LOG_RATE)
            return
        if dropped := self._dropped.pop(host, 0):
            LOGGER.warning("%s: %d records were dropped.", name, dropped)
        logger, level, text = _parse(data)
        # The host chooses what is written: it must not look like records of its own.
        LOGGER.log(level, "%s: %s: %s", name, logger, text.replace("\n", "\n    | "))

    def end(self, host: int) -> None:
        """
        :param host: The id of a context that has ended.
        """
        self._allowances.pop(host, None)
        if dropped := self._dropped.pop(host, 0):
            LOGGER.warning("A host that ended had %d of its log records dropped.", dropped)


def _parse(data: bytes) -> tuple[str, int, str]:
    # Four bytes a character at most.
    parts = data[: 4 * LONGEST_RECORD].decode("utf-8", "replace").split("\0", 2)
    if len(parts) < 3:
        return "?", logging.INFO, bounded_text("".join(parts), LONGEST_RECORD)
    logger, level, text = parts
    number = int(level) if level.isdecimal() and len(level) <= 2 else logging.INFO
    logger = bounded_text(logger, LONGEST_LOGGER_NAME).replace("\n", " ")
    return logger, min(number, logging.CRITICAL), bounded_text(text, LONGEST_RECORD)

"""What hosts log, and what they print: forwarded to the agent's log, within bounds."""

import logging

from inmanta_plugins.mitogen import settings
from inmanta_plugins.mitogen.hosts.streams import Allowance
from inmanta_plugins.mitogen.texts import bounded_text

LOGGER = logging.getLogger("inmanta_plugins.mitogen.host")
"""Gets what hosts log, at the level they log it at."""


class ForwardedLog:
    """
    The log records of one host.

    :param name: What people know the host by.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._allowance = Allowance(settings.LOG_BURST, settings.LOG_RATE)
        self._dropped = 0

    def log(self, data: bytes) -> None:
        """
        Log a record, unless there are too many.

        :param data: What the host sent: the name of its logger, the level and the text.
        """
        needed = settings.LOG_RESUME if self._dropped else 1
        if self._allowance.left < needed or not self._allowance.take():
            self._dropped += 1
            if self._dropped == 1:
                text = "%s: logs more than %d records a second: dropped."
                LOGGER.warning(text, self._name, settings.LOG_RATE)
            return
        if self._dropped:
            LOGGER.warning("%s: %d records were dropped.", self._name, self._dropped)
            self._dropped = 0
        logger, level, text = _parse(data)
        # The host chooses what is written: it must not look like records of its own.
        LOGGER.log(level, "%s: %s: %s", self._name, logger, text.replace("\n", "\n    | "))


def _parse(data: bytes) -> tuple[str, int, str]:
    # Four bytes a character at most.
    parts = data[: 4 * settings.LONGEST_RECORD].decode("utf-8", "replace").split("\0", 2)
    if len(parts) < 3:
        return "?", logging.INFO, bounded_text("".join(parts), settings.LONGEST_RECORD)
    logger, level, text = parts
    number = int(level) if level.isdecimal() and len(level) <= 2 else logging.INFO
    logger = bounded_text(logger, settings.LONGEST_LOGGER_NAME).replace("\n", " ")
    return logger, min(number, logging.CRITICAL), bounded_text(text, settings.LONGEST_RECORD)

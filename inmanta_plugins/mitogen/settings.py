"""Every environment variable, timeout and limit of the agent's side, each with its meaning.

The variables are read here and nowhere else, at each use, so that a change takes effect at once.
"""

import functools
import logging
import math
import os
import re
from collections.abc import Callable
from typing import Final, TypeVar

LOGGER = logging.getLogger("inmanta_plugins.mitogen")

# Environment variables

LOGGED_VALUE_MAX_LEN_ENV_VAR: Final = "INMANTA_MITOGEN_LOGGED_VALUE_MAX_LEN"
"""The variable with the maximum length of a logged value, in characters of its JSON text."""
DEFAULT_LOGGED_VALUE_MAX_LEN: Final = 50

LOGGED_TRUNCATED_VALUE_ENV_VAR: Final = "INMANTA_MITOGEN_LOGGED_TRUNCATED_VALUE_SUFFIX"
"""The variable with the text that ends a truncated logged value."""
DEFAULT_LOGGED_TRUNCATED_VALUE_SUFFIX: Final = "<...>"

CALL_TIMEOUT_ENV_VAR: Final = "INMANTA_MITOGEN_CALL_TIMEOUT"
"""The variable with the seconds that each remote call may take; no limit by default."""

MAX_SIZE_ENV_VAR: Final = "INMANTA_MITOGEN_MAX_SIZE"
"""The variable with the maximum size of a file that is read or of a command's output, in bytes."""
DEFAULT_MAX_SIZE: Final = 1 << 30

MAX_MESSAGE_SIZE_ENV_VAR: Final = "INMANTA_MITOGEN_MAX_MESSAGE_SIZE"
"""The variable with the maximum size of one message to or from a host, in bytes."""
DEFAULT_MAX_MESSAGE_SIZE: Final = 128 << 20
# A lower one, and the source of a module would not fit.
LEAST_MAX_MESSAGE_SIZE: Final = 1 << 20

PREFETCH_ENV_VAR: Final = "INMANTA_MITOGEN_PREFETCH"
"""The variable that turns prefetching off when it is ``0``; on by default."""

CHECK_HOST_KEYS_ENV_VAR: Final = "INMANTA_MITOGEN_CHECK_HOST_KEYS"
"""The variable with the host key policy of all implicit contexts; ``ignore`` by default."""
CHECK_HOST_KEYS: Final = ("enforce", "accept", "ignore")
"""The host key policies of mitogen."""

# Limits

MAX_HOPS: Final = 64
"""The most hops of a context: how deep ``via`` may be nested."""
LONGEST_DETAIL: Final = 8_000
"""How much an exception shows of what a host wrote, in characters."""
SHOWN_LINES: Final = 12
"""How many of the last lines that came back from a failed connection an exception shows."""
LONGEST_SHOWN_LINE: Final = 500
"""How much it shows of each, in characters."""
LONGEST_REASON: Final = 1_000
"""How much an exception shows of why a call was not answered, in characters."""
LOGGED_DEPTH: Final = 60
"""How deep logged values are nested: deeper than any log is read, and far from the recursion limits
of Python and PostgreSQL."""
MOST_ATTEMPTS: Final = 6
"""How often a connection is tried that the server ends at once: it has too many at the moment."""
NEAR_WINDOW: Final = 2
"""The most chunks on the way to a near host. It need not be more there; and sshd (9.2) takes in all
that there is before it passes anything on, in a buffer whose growth to 2 MiB takes 50 ms."""
PROBED: Final = 16
"""How many interpreters are tried to find those of a host."""
PROBED_SILENT: Final = 2
"""How many of them may not answer within `PROBE_SECONDS`."""
PROBE_OUTPUT: Final = 1500
"""How much of what a failing interpreter printed comes back, from its end, in bytes."""

# Limits on what a host may send

MOST_REJECTED: Final = 1_000
"""How many messages that nothing asked for a host may send before it is cut off."""
MOST_REFUSALS: Final = 100
"""How many refused names are remembered for each host, so as to log each once."""
LONGEST_NAME: Final = 500
"""The maximum length of the name of a module or data file that a host asks for, in characters."""
LARGEST_DATA_FILE: Final = 16 << 20
"""The maximum size of a data file that a host gets, in bytes."""
LOG_BURST: Final = 1_000
"""How many log records of a host are logged at once."""
LOG_RATE: Final = 20
"""How many log records of a host are logged each second in the long run."""
LOG_RESUME: Final = 100
"""How many must be possible at once before logging goes on after records were dropped."""
LONGEST_RECORD: Final = 8_192
"""How much of the text of a log record is logged, in characters."""
LONGEST_LOGGER_NAME: Final = 100
"""How much of the name of its logger is logged, in characters."""
MOST_BEFORE_CONNECTED: Final = 8 << 20
"""What may come from a host before its Python runs, in bytes: banners, prompts, messages."""
LONGEST_LINE: Final = 16 << 10
"""What is kept of a line there, and of one on stderr, in bytes: its end."""
MOST_TO_CONNECT: Final = 4 << 20
"""What may wait to be sent to a host before its Python runs, in bytes."""
STDERR_BURST: Final = 256 << 10
"""What may come on the stderr of a connection at once, in bytes."""
STDERR_RATE: Final = 4 << 10
"""What may come on it in the long run, in bytes a second."""
ANSWER_MEMORY: Final = 512 << 20
"""The maximum memory of the values of one answer, estimated, in bytes."""
ANSWER_SECONDS: Final = 30.0
"""The maximum processor time for reading one answer, in seconds."""
LONGEST_REMOTE_ERROR: Final = 9_999
"""How much of a remote exception's text is kept, in characters: as much as mitogen sends."""
KEY_DEPTH: Final = 100
"""How deep tuples may be nested in the key of a dict, or in a set."""
KEY_PARTS: Final = 10_000
"""How many parts they may have."""
MOST_KEYS: Final = 10_000
"""How many keys a host may add at once to a dict or set: Python itself adds 1,000, but for
frozensets. Keys that collide take quadratic time, and nothing can interrupt it."""
UNPRICED_ANSWER: Final = 64 << 10
"""The size of an answer whose values take little memory and time whatever they are, in bytes."""

# Timeouts, in seconds

NEAR_SECONDS: Final = 0.025
"""A host that begins a transfer within that time is near."""
SECONDS_BETWEEN_CHECKS: Final = 5.0
"""How often a call without a deadline checks that its connection is still there."""
PREFETCHED_SECONDS: Final = 1.0
"""How long a prefetched answer may be used after it came."""
HOP_GRACE: Final = 5.0
"""How much longer than its own ``connect_timeout`` the answer of a hop may take."""
HOP_LEAVE_TIMEOUT: Final = 5.0
"""How long the last user of a hop waits for the end of its interpreter."""
CLOSE_TIMEOUT: Final = 1.0
"""How long an interpreter that answers may take to close its connection when it was told to leave:
then somebody else holds it open."""
LEAST_TIMEOUT: Final = 0.5
"""What the last step of connecting gets when hardly anything of the connect_timeout is left."""
PROBE_SECONDS: Final = 5
"""How long one interpreter may take to tell its version. With `PROBED_SILENT` that hang, and the
requested one hanging too, the answer is there after 15 s, half of the default connect_timeout."""
LEAVE_TIMEOUT: Final = 0.5
"""How long an interpreter that is terminated may take to end by itself."""


class SettingError(ValueError):
    """An environment variable of this module has an invalid value; the text says what is valid."""


T = TypeVar("T")


def _variable(
    name: str, default: T, parse: Callable[[str], T], expected: str, text: str | None = None
) -> T:
    """Return the value of an environment variable, the default when it is unset or empty."""
    text = (os.environ.get(name, "") if text is None else text).strip()
    if not text:
        return default
    try:
        return parse(text)
    except (ValueError, KeyError):
        raise SettingError(
            f"The environment variable {name} is {text[:80]!r}: set it to {expected}, or unset it."
        ) from None


def call_timeout(given: float | None = None) -> float | None:
    """
    Return the seconds that each remote call may take.

    :param given: What a handler has set; None for what :data:`CALL_TIMEOUT_ENV_VAR` says.
    :return: None for no limit, when the variable is unset or empty.
    :raises ValueError: `given` is not a finite number above 0.
    :raises SettingError: The variable isn't.
    """
    if given is not None:
        if not (math.isfinite(given) and given > 0):
            raise ValueError(f"call_timeout is {given!r}: it must be a number of seconds above 0")
        return float(given)
    expected = "the seconds that a remote call may take, a number above 0"
    return _variable(CALL_TIMEOUT_ENV_VAR, None, lambda text: call_timeout(float(text)), expected)


def max_size() -> int:
    """
    Return the maximum size that :data:`MAX_SIZE_ENV_VAR` gives to a file that is read and to the
    output of a command, in bytes.

    :raises SettingError: It is not a whole number above 0.
    """
    return _bytes(MAX_SIZE_ENV_VAR, DEFAULT_MAX_SIZE, 1)


def max_message_size() -> int:
    """
    Return the maximum size that :data:`MAX_MESSAGE_SIZE_ENV_VAR` gives to one message, in bytes.

    It limits what a host can make the agent hold for one call, and what one call can carry.

    :raises SettingError: It is not a whole number, or less than 1 MiB.
    """
    return _bytes(MAX_MESSAGE_SIZE_ENV_VAR, DEFAULT_MAX_MESSAGE_SIZE, LEAST_MAX_MESSAGE_SIZE)


def _bytes(name: str, default: int, least: int) -> int:
    return _variable(name, default, _from(least, 19), f"a number of bytes, at least {least}")


def _from(least: int, digits: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(f"[0-9]{{1,{digits}}}", text) or int(text) < least:
            raise ValueError(text)
        return int(text)

    return parse


def prefetch() -> bool:
    """
    Return whether :data:`PREFETCH_ENV_VAR` allows prefetching.

    :raises SettingError: It is neither 0 nor 1.
    """
    values = {"0": False, "1": True}
    return _variable(PREFETCH_ENV_VAR, True, values.__getitem__, "0 to turn prefetching off")


def check_host_keys() -> str | None:
    """
    Return the host key policy that :data:`CHECK_HOST_KEYS_ENV_VAR` gives to implicit contexts.

    :return: One of :data:`CHECK_HOST_KEYS`; None when it is unset or empty.
    :raises SettingError: It is anything else.
    """
    policies: dict[str, str | None] = {policy: policy for policy in CHECK_HOST_KEYS}
    expected = f"one of {', '.join(CHECK_HOST_KEYS)}"
    return _variable(CHECK_HOST_KEYS_ENV_VAR, None, policies.__getitem__, expected)


def logged_values() -> tuple[int, str]:
    """
    Return how values are logged: the maximum length of one, in characters of its JSON text, and the
    end of a truncated one. An invalid maximum length is reported once, and the default used.
    """
    suffix = os.environ.get(LOGGED_TRUNCATED_VALUE_ENV_VAR, DEFAULT_LOGGED_TRUNCATED_VALUE_SUFFIX)
    return _max_len(os.environ.get(LOGGED_VALUE_MAX_LEN_ENV_VAR, "")), suffix


@functools.lru_cache(maxsize=8)
def _max_len(text: str) -> int:
    name, default = LOGGED_VALUE_MAX_LEN_ENV_VAR, DEFAULT_LOGGED_VALUE_MAX_LEN
    try:
        # Of 19 digits, itertools.islice does not take all numbers.
        return _variable(name, default, _from(0, 18), "a number of characters, 0 or more", text)
    except SettingError as error:
        LOGGER.warning("%s Logged values are truncated to %d characters instead.", error, default)
        return default

"""
What of a value reaches the log.
"""

import array
import collections
import collections.abc
import dataclasses
import enum
import itertools
import json
import logging
import pathlib
import random
import sys
import threading
import tracemalloc
import types
import uuid

import mitogen.core
import pytest

from inmanta_plugins.mitogen import settings
from inmanta_plugins.mitogen.calls.log import truncate_logged_value

HUGE = 5_000_000


SetLimit = collections.abc.Callable[[object, str], None]


@pytest.fixture(autouse=True)
def set_limit(monkeypatch: pytest.MonkeyPatch) -> SetLimit:
    """Set the limit and the suffix, which have their defaults otherwise."""

    def set_both(limit: object, suffix: str) -> None:
        monkeypatch.setenv(settings.LOGGED_VALUE_MAX_LEN_ENV_VAR, str(limit))
        monkeypatch.setenv(settings.LOGGED_TRUNCATED_VALUE_ENV_VAR, suffix)

    monkeypatch.delenv(settings.LOGGED_VALUE_MAX_LEN_ENV_VAR, raising=False)
    monkeypatch.delenv(settings.LOGGED_TRUNCATED_VALUE_ENV_VAR, raising=False)
    return set_both


def assert_storable(value: object) -> None:
    """
    Return what PostgreSQL's jsonb takes, and what the orchestrator makes of it on the way there.
    """
    text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    assert json.loads(text) == value
    assert "\\u0000" not in text
    text.encode()  # a lone surrogate has no UTF-8


class Colour(enum.Enum):
    RED = 1


class Word(enum.StrEnum):
    YES = "yes"


class Text(str):
    pass


@dataclasses.dataclass
class Pair:
    left: object
    right: object = 1


class Unprintable:
    def __repr__(self) -> str:
        raise RecursionError("no text of mine")


class Masked(bytes):
    def __repr__(self) -> str:
        return "masked"


SECRET, BLOB = mitogen.core.Secret("hush"), mitogen.core.Blob(b"hush")
TWICE = ["a"]
FITS: list[tuple[object, object]] = [
    (None, None),
    (True, True),
    (1.5, 1.5),
    (10**40, 10**40),
    ("x" * 48, "x" * 48),
    ("😀", "😀"),
    (Text("x"), "x"),
    (Word.YES, "yes"),
    ((1, (2, 3)), [1, [2, 3]]),
    ([TWICE, TWICE], [["a"], ["a"]]),
    ({"b": 1, "a": [2]}, {"b": 1, "a": [2]}),
    ({None: 1, True: 2, 1.5: 3}, {"null": 1, "true": 2, "1.5": 3}),
    (collections.OrderedDict(a=1), {"a": 1}),
    # By its repr
    ([b"a'b"], ['b"a\'b"']),
    (bytearray(b"ab"), "bytearray(b'ab')"),
    (pathlib.PurePosixPath("/a"), "PurePosixPath('/a')"),
    (Colour.RED, "<Colour.RED: 1>"),
    (ValueError("x"), "ValueError('x')"),
    (object, "<class 'object'>"),
    (set(), "set()"),
    ({(1,)}, "{(1,)}"),
    ({(1.5, ())}, "{(1.5, ())}"),
    (frozenset({frozenset({b"a"})}), "frozenset({frozenset({b'a'})})"),
    ([Masked(b"hush")], ["masked"]),
    (["a", Unprintable()], ["a", "<unprintable Unprintable: RecursionError>"]),
    ({Unprintable(): 1}, {"<unprintable Unprintable: RecursionError>": 1}),
    # Masked
    (SECRET, "[secret]"),
    (mitogen.core.Secret("hush" * 100), "[secret]"),
    (BLOB, "[blob: 4 bytes]"),
    ({SECRET: [BLOB]}, {"[secret]": ["[blob: 4 bytes]"]}),
    ({(SECRET, BLOB)}, "{([secret], [blob: 4 bytes])}"),
    (Pair(SECRET), "Pair(left=[secret], right=1)"),
    (ValueError(SECRET), "ValueError([secret])"),
    # What PostgreSQL refuses, as Python writes it
    (["a\0b", {"\0": "\0"}], ["a\\x00b", {"\\x00": "\\x00"}]),
    ("caf\udce9\ud800", "caf\\udce9\\ud800"),
    ("\ud83d\ude00", "\\ud83d\\ude00"),
    (float("nan"), "nan"),
    ([float("inf"), {float("nan"): float("-inf")}], ["inf", {"nan": "-inf"}]),
    ({(1, "a"): 1, b"k": 2}, {"(1, 'a')": 1, "b'k'": 2}),
    ([-(1 << 50_000)], ["<int of 50001 bits>"]),
    ({1 << 50_000: 1}, {"<int of 50001 bits>": 1}),
]


@pytest.mark.parametrize(("value", "logged"), FITS, ids=itertools.count())
def test_a_value_whose_json_fits_is_logged_as_json_holds_it(value: object, logged: object) -> None:
    result = truncate_logged_value(value)
    assert result == logged
    assert type(result) is type(logged)
    assert_storable(result)


CYCLE: list[object] = [1]
CYCLE.append(CYCLE)
LOOP: dict[str, object] = {}
LOOP["self"] = LOOP


@pytest.mark.parametrize(
    ("value", "logged"),
    [
        ("x" * 49, '"' + "x" * 44 + "<...>"),
        (b"x" * 60, "\"b'" + "x" * 42 + "<...>"),
        (list(range(40)), "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13<...>"),
        ("é" * 30, '"' + "\\u00e9" * 7 + "\\u<...>"),
        ({"key": {"n": "x" * 60}}, '{"key": {"n": "' + "x" * 30 + "<...>"),
        (10**60, "1" + "0" * 44 + "<...>"),
        (CYCLE, "[1, " * 11 + "[<...>"),
        (LOOP, '{"self": ' * 5 + "<...>"),
    ],
    ids=itertools.count(),
)
def test_a_longer_value_is_logged_as_cut_json_text(value: object, logged: str) -> None:
    assert truncate_logged_value(value) == logged
    assert len(logged) == 50


def wild_value(rng: random.Random, depth: int = 4) -> object:
    """
    Return what comes along at worst.
    """
    some, many = rng.randrange(40), rng.randrange(6000)
    hashable = ["a\0b", "\ud800", float("nan"), "\udcff" * some, b"\0\xff" * some, 10**many]
    others = [threading.Lock(), memoryview(b"hush"), array.array("d", [float("nan")])]
    leaf = rng.choice([*hashable, *others, *(value for value, _ in FITS)])
    if not depth:
        return leaf
    items = [wild_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    containers: list[object] = [
        leaf,
        items,
        tuple(items),
        collections.deque(items),
        Pair(items, leaf),
        Exception(*items),
        {rng.choice(hashable): item for item in items},
        types.MappingProxyType(dict(enumerate(items))),
    ]
    return rng.choice(containers)


def test_whatever_is_logged_can_be_stored_and_is_short(set_limit: SetLimit) -> None:
    rng = random.Random(2)
    for _ in range(1000):
        value = wild_value(rng)
        limit, suffix = rng.choice([0, 3, 50, 51, 5_000]), rng.choice(["<...>", "\udcff", "-" * 60])
        set_limit(limit, suffix)
        logged = truncate_logged_value(value)
        assert_storable(logged)
        assert len(json.dumps(logged)) <= limit or (
            isinstance(logged, str) and len(logged) == limit
        )
        assert "hush" not in json.dumps(logged)


def test_an_int_is_logged_where_python_may_write_few_digits_only() -> None:
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(640)
    try:
        logged = truncate_logged_value([10**1000])
    finally:
        sys.set_int_max_str_digits(before)
    assert logged == ["<int of 3322 bits>"]


@pytest.mark.parametrize("wrap", [lambda v: [v], lambda v: {"k": v}])
def test_deep_nesting_is_cut(
    wrap: collections.abc.Callable[[object], object], set_limit: SetLimit
) -> None:
    set_limit(1_000_000, "")
    value: object = 1
    for _ in range(100_000):
        value = wrap(value)
    logged = json.dumps(truncate_logged_value(value))
    assert 60 < len(logged) < 3_000
    assert "..." in logged


@pytest.mark.parametrize(
    "make",
    [
        lambda: Text("x" * HUGE),
        lambda: b"x" * HUGE,
        lambda: bytearray(HUGE),
        lambda: [0] * HUGE,
        lambda: (0,) * HUGE,
        lambda: dict.fromkeys(range(500_000)),
        lambda: set(range(500_000)),
        lambda: {"x" * HUGE: 1},
        lambda: {("x" * HUGE, b"x" * HUGE)},
        lambda: [[{"k": ["x" * HUGE]}]],
        lambda: -(1 << (8 * HUGE)),
    ],
    ids=itertools.count(),
)
def test_a_huge_value_is_cut_without_a_second_copy_of_it(
    make: collections.abc.Callable[[], object],
) -> None:
    value = make()
    truncate_logged_value(None)  # reads the settings
    tracemalloc.start()
    try:
        logged = truncate_logged_value(value)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000
    assert len(json.dumps(logged)) <= 70


# The variables


def test_the_limit_and_the_suffix_are_read_at_each_call(set_limit: SetLimit) -> None:
    for limit, suffix, logged in (
        (10, "...", '"xxxxxx...'),
        (12, "!", '"xxxxxxxxxx!'),
        (6, "<...>", '"<...>'),
        (5, "<...>", "<...>"),
        (4, "<...>", "<..."),
        (0, "<...>", ""),
    ):
        set_limit(limit, suffix)
        assert truncate_logged_value("x" * 60) == logged
    set_limit(5, "")
    assert truncate_logged_value("xxx") == "xxx"


@pytest.mark.parametrize("form", ["many-{}", "-1{}", "1.5{}", "{}x"])
def test_a_limit_that_is_no_number_falls_back_to_the_default_with_one_warning(
    form: str, set_limit: SetLimit, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = form.format(uuid.uuid4().int)  # none that was warned of before
    set_limit(wrong, "<...>")
    with caplog.at_level(logging.WARNING):
        assert truncate_logged_value("x" * 48) == "x" * 48
        assert truncate_logged_value("x" * 60) == '"' + "x" * 44 + "<...>"
        set_limit(30, "")
        truncate_logged_value("x" * 60)
        set_limit(wrong, "<...>")
        truncate_logged_value("x" * 60)
    [record] = caplog.records
    assert "INMANTA_MITOGEN_LOGGED_VALUE_MAX_LEN" in record.getMessage()
    assert wrong in record.getMessage()

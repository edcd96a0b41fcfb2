"""
A context that can't be connected is refused before anything is started.
"""

import copy
import itertools
import pathlib
from typing import Any

import mitogen.parent
import pytest

from inmanta_plugins.mitogen.contexts.options import METHODS, ONE_OF
from inmanta_plugins.mitogen.contexts.validate import checked_context
from inmanta_plugins.mitogen.errors import ContextError
from inmanta_plugins.mitogen.settings import SettingError
from support import IMPLICIT

SSH: dict[str, Any] = {"method_name": "ssh", "hostname": "10.0.0.1", "username": "probe"}

EXAMPLES: dict[type, Any] = {
    bool: True,
    int: 3,
    float: 2.5,
    str: "word",
    list: ["-E"],
}
POLICY = "INMANTA_MITOGEN_CHECK_HOST_KEYS"
CHOICES = {"check_host_keys": "accept", "kind": "lxd"}


def complete(method: str) -> dict[str, Any]:
    """
    Return a context with every option of a method.
    """
    options = {
        name: CHOICES.get(name, EXAMPLES[option.type]) for name, option in METHODS[method].items()
    }
    return {"method_name": method, **options}


@pytest.mark.parametrize("method", METHODS)
def test_every_option_of_every_method_is_taken_by_us_and_by_mitogen(method: str) -> None:
    context = complete(method)
    assert checked_context(context) == context
    del context["method_name"]
    mitogen.parent.get_connection_class(method).options_class(max_message_size=1, **context)


@pytest.mark.parametrize("method", METHODS)
def test_an_option_of_none_is_one_that_is_not_set(method: str) -> None:
    one_of = ONE_OF.get(method, ())
    kept = {name for name, option in METHODS[method].items() if option.required} | set(one_of[:1])
    context = complete(method)
    set_ones = {name: value for name, value in context.items() if name in kept | {"method_name"}}
    assert checked_context(dict.fromkeys(context) | set_ones | {"via": None}) == set_ones
    for name in kept:
        with pytest.raises(ContextError, match=name):
            checked_context(context | dict.fromkeys(one_of) | {name: None})


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"connect_timeout": 0.5}, {"connect_timeout": 0.5}),
        ({"username": "", "password": ""}, {"username": "", "password": ""}),
        ({"identity_file": pathlib.Path("/keys/id")}, {"identity_file": "/keys/id"}),
        (
            {"python_path": (pathlib.Path("/bin/python"), "-I")},
            {"python_path": ["/bin/python", "-I"]},
        ),
        ({"ssh_args": ("-v",)}, {"ssh_args": ["-v"]}),
        ({"port": "2222"}, {"port": 2222}),
        ({"compression": 1}, {"compression": True}),
        ({"compression": 0}, {"compression": False}),
    ],
)
def test_a_value_whose_meaning_is_clear_is_read_as_the_type_of_its_option(
    given: dict[str, Any], read: dict[str, Any]
) -> None:
    context = {"method_name": "sudo", "via": SSH | given}
    before = copy.deepcopy(context)
    checked = checked_context(context)
    assert checked == {"method_name": "sudo", "via": SSH | read}
    assert [type(checked["via"][key]) for key in read] == [type(value) for value in read.values()]
    assert context == before


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"check_host_keys": "enforced"}, "'check_host_keys'.*enforce, accept, ignore.*'enforced'"),
        ({"port": 0}, "'port'.*from 1 to 65535, not 0"),
        ({"port": 65536}, "'port'.*65536"),
        ({"port": 10**5000}, "'port'.*from 1 to 65535, not int"),
        ({"port": "22a"}, "'port' has to be an integer.*not '22a'"),
        ({"port": "9" * 5000}, "'port' has to be an integer.*not '999"),
        ({"port": 22.0}, "'port' has to be an integer.*not 22.0"),
        ({"port": True}, "'port' has to be an integer.*not True"),
        ({"connect_timeout": 0}, "'connect_timeout'.*above 0"),
        ({"connect_timeout": float("inf")}, "'connect_timeout'"),
        ({"connect_timeout": float("nan")}, "'connect_timeout'"),
        ({"connect_timeout": "5"}, "'connect_timeout'.*not '5'"),
        ({"hostname": ""}, "'hostname'.*not empty"),
        ({"hostname": "-oProxyCommand=sh"}, "'hostname'.*does not begin with '-'"),
        ({"hostname": "h\0"}, "'hostname' holds a NUL"),
        ({"ssh_args": ["a\0b"]}, "'ssh_args' holds a NUL"),
        ({"username": "-lroot"}, "'username'.*does not begin with '-'"),
        ({"ssh_path": "-x"}, "'ssh_path'"),
        ({"python_path": ["python3", ""]}, "'python_path'.*none of which is empty, not .*''"),
        ({"python_path": []}, "'python_path' has to be a list of at least one string.*not .]"),
        ({"python_path": "python3"}, "'python_path' has to be a list.*not 'python3'"),
        ({"python_path": pathlib.Path("/bin/python")}, "'python_path'.*not PosixPath"),
        ({"python_path": ["python3", 3]}, "'python_path'.*not .'python3', 3]"),
        ({"ssh_args": "-v"}, "'ssh_args' has to be a list of strings, not '-v'"),
        ({"compression": "yes"}, "'compression' has to be a bool, not 'yes'"),
        ({"keepalive_count": 0}, "'keepalive_count'.*from 1"),
        ({"ssh_debug_level": -1}, "'ssh_debug_level'.*from 0"),
        ({"remote_name": "a/b"}, "'remote_name'.*without slashes"),
        ({"remote_name": "a\\b"}, "'remote_name'.*without slashes"),
        ({"name": 3}, "'name' has to be a string, not 3"),
        ({"hostname": None}, "'hostname' is missing; ssh needs it"),
        ({"hostnam": "h"}, "'hostnam'.*did you mean 'hostname'.*ssh takes .*hostname.*username"),
        ({3: 4}, "unknown option 3"),
        ({"via": []}, "'via' has to be a serialized context"),
        ({"method_name": None}, "'method_name' has to be one of local, ssh, .*, not None"),
        ({"method_name": "shh"}, "one of local, ssh, .*, not 'shh'.*did you mean 'ssh'"),
        ({"method_name": "fork"}, "one of local, ssh, .*, not 'fork'"),
    ],
    ids=itertools.count(),
)
def test_the_error_names_hop_key_and_what_is_allowed(wrong: dict[Any, Any], told: str) -> None:
    context = SSH | wrong
    before = copy.deepcopy(context)
    with pytest.raises(ContextError, match=told) as failure:
        checked_context(context)
    assert str(failure.value).startswith("context (")
    assert len(str(failure.value)) < 700
    assert context == before

    with pytest.raises(ContextError, match=told) as failure:
        checked_context({"method_name": "sudo", "via": context})
    assert str(failure.value).startswith("hop 1 of 2 (")


def test_the_hop_that_is_wrong_is_the_one_that_is_named() -> None:
    context = {
        "method_name": "su",
        "via": {"method_name": "sudo", "username": 3, "via": SSH | {"name": "gate"}},
    }
    with pytest.raises(ContextError, match=r"^hop 2 of 3 \(sudo root\): 'username'"):
        checked_context(context)


def test_what_is_no_dict_is_refused() -> None:
    wrongs: list[object] = [None, [], "ssh", 3]
    for wrong in wrongs:
        with pytest.raises(ContextError, match="has to be a dict"):
            checked_context(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"password": "hush\0"},
        {"password": ["hush"]},
        {"password": {"hush": "hush"}},
        {"passwrd": "hush"},
        {"password": "hush", "port": -1},
        {"password": "hush", "hostname": None},
    ],
)
def test_no_error_shows_a_secret(wrong: dict[str, Any]) -> None:
    for context in (SSH | wrong, {"method_name": "sudo", "password": "hush", "via": SSH | wrong}):
        with pytest.raises(ContextError) as failure:
            checked_context(context)
        assert "hush" not in str(failure.value)
        assert failure.value.__cause__ is None


def test_a_context_is_nested_only_so_deep_and_not_in_itself() -> None:
    context: dict[str, Any] = {"method_name": "local"}
    for _ in range(63):
        context = {"method_name": "sudo", "via": context}
    checked_context(context)
    for _ in range(100_000):
        context = {"method_name": "sudo", "via": context}
    with pytest.raises(ContextError, match="more than 64 hops"):
        checked_context(context)
    context["via"] = {"method_name": "sudo", "via": context}
    with pytest.raises(ContextError, match="its own 'via'"):
        checked_context(context)


@pytest.mark.parametrize("policy", [None, "ignore", "accept", "enforce"])
def test_the_operator_of_the_agent_sets_the_policy_of_implicit_contexts(
    policy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = IMPLICIT
    monkeypatch.delenv(POLICY, raising=False)
    if policy is not None:
        monkeypatch.setenv(POLICY, policy)
    if policy in ("accept", "enforce"):
        ssh_args = ["-o", "PasswordAuthentication=no"]
        expected = IMPLICIT | {"check_host_keys": policy, "ssh_args": ssh_args}
    context = {"method_name": "sudo", "name": "", "via": IMPLICIT}
    before = copy.deepcopy(context)

    assert checked_context(IMPLICIT) == expected
    assert checked_context(context) == {"method_name": "sudo", "name": "", "via": expected}
    assert context == before


@pytest.mark.parametrize(
    "explicit",
    [
        SSH,
        SSH | {"check_host_keys": "ignore"},
        IMPLICIT | {"check_host_keys": "enforce"},
        IMPLICIT | {"ssh_args": [*IMPLICIT["ssh_args"], "-v"]},
        {"method_name": "local"},
    ],
)
def test_a_context_that_the_model_writes_keeps_its_own_policy(
    explicit: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(POLICY, "enforce")
    context = {"method_name": "sudo", "via": explicit}
    assert checked_context(context) == context


@pytest.mark.parametrize("wrong", ["Enforce", "yes", "enforce, accept"])
def test_a_wrong_policy_is_an_error_that_names_it(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(POLICY, wrong)
    with pytest.raises(SettingError) as failure:
        checked_context({"method_name": "local"})
    for told in (POLICY, repr(wrong), "enforce, accept, ignore"):
        assert told in str(failure.value)

"""
What people read about a context.
"""

import copy
from typing import Any

import mitogen.core
import mitogen.parent
import pytest

from inmanta_plugins.mitogen import settings
from inmanta_plugins.mitogen.contexts.options import (
    IMPLICIT_SSH_ARGS,
    MASK,
    METHODS,
    SECRET_OPTIONS,
    is_secret_key,
    mask_secrets,
)
from inmanta_plugins.mitogen.texts import (
    address_of,
    describe_context,
    describe_hop,
    hops_of,
    user_of,
)

SSH: dict[str, Any] = {"method_name": "ssh", "hostname": "10.0.0.1"}


@pytest.mark.parametrize(
    ("hop", "description"),
    [
        ({"method_name": "local"}, "local"),
        ({"method_name": "local", "name": "here"}, "here (local)"),
        (SSH, "ssh 10.0.0.1"),
        (SSH | {"username": "probe"}, "ssh probe@10.0.0.1"),
        (SSH | {"username": "probe", "port": 2222}, "ssh probe@10.0.0.1:2222"),
        (SSH | {"port": 22, "name": "web"}, "web (ssh 10.0.0.1)"),
        (SSH | {"hostname": "::1", "port": 2222}, "ssh [::1]:2222"),
        ({"method_name": "sudo", "username": None}, "sudo root"),
        ({"method_name": "su", "username": "app"}, "su app"),
        ({"method_name": "docker", "image": "alpine"}, "docker alpine"),
        ({"method_name": "docker", "container": "web", "image": "alpine"}, "docker web"),
        ({"method_name": "podman", "container": "web", "username": "app"}, "podman app@web"),
        ({"method_name": "kubectl", "pod": "web-0"}, "kubectl web-0"),
        ({"method_name": "setns", "container": "web", "kind": "lxc"}, "setns root@web"),
    ],
)
def test_a_hop_is_described_by_its_name_method_user_and_address(
    hop: dict[str, Any], description: str
) -> None:
    assert describe_hop(hop) == description


@pytest.mark.parametrize(
    "hop",
    [
        {},
        {"method_name": None, "name": 3},
        {"method_name": ["ssh"], "hostname": ["h"], "username": 7, "port": "22"},
        {"method_name": "ssh", "hostname": 10, "port": True},
        {"method_name": "teleport", "hostname": "h"},
        {"via": 3},
    ],
)
def test_a_context_of_the_wrong_form_is_described_all_the_same(hop: dict[str, Any]) -> None:
    assert describe_hop(hop)
    assert describe_context(hop)
    assert isinstance(address_of(hop), str)
    user_of(hop)


def test_a_context_is_described_with_the_way_to_it() -> None:
    inner = {"method_name": "docker", "container": "web", "via": SSH | {"name": "gate"}}
    context = {"method_name": "sudo", "name": "", "via": inner}
    assert describe_context(context) == "sudo root via docker web via gate (ssh 10.0.0.1)"


def test_hops_come_in_the_order_in_which_they_are_connected() -> None:
    sudo = {"method_name": "sudo", "via": SSH}
    assert hops_of({"method_name": "su", "via": sudo})[:2] == [SSH, sudo]
    assert hops_of(SSH | {"via": None}) == [SSH | {"via": None}]


def test_a_context_that_is_its_own_via_has_an_end() -> None:
    context: dict[str, Any] = {"method_name": "local", "password": "hush"}
    context["via"] = context
    assert len(hops_of(context)) == settings.MAX_HOPS + 1
    assert "hush" not in str(mask_secrets(context))
    assert describe_context(context)


def test_the_secret_options_are_those_that_hold_a_password() -> None:
    assert {"password"} == SECRET_OPTIONS
    # mitogen answers these prompts with it: no method has a password that is not in the table
    with_password = {
        name
        for name in METHODS
        if hasattr(mitogen.parent.get_connection_class(name).options_class, "password")
    }
    assert with_password == {name for name in METHODS if "password" in METHODS[name].options}


@pytest.mark.parametrize(
    "key", ["password", "Password", "passwd", "sudo_password", "passphrase", "token", "secret"]
)
def test_what_sounds_secret_is_secret(key: str) -> None:
    assert is_secret_key(key)


@pytest.mark.parametrize("key", ["password_prompt", "hostname", "identity_file", None, 3, ("a",)])
def test_what_is_no_secret_is_shown(key: object) -> None:
    assert not is_secret_key(key)


def test_secrets_are_masked_at_every_hop_and_nothing_else_is() -> None:
    context = {
        "method_name": "sudo",
        "password": "hush",
        "via": SSH | {"password": ["hush"], "via": {"method_name": "su", "password": None}},
        "more": [{"passwd": "hush"}, ("a", {"token": "hush"})],
    }
    before = copy.deepcopy(context)
    assert mask_secrets(context) == {
        "method_name": "sudo",
        "password": MASK,
        "via": SSH | {"password": MASK, "via": {"method_name": "su", "password": None}},
        "more": [{"passwd": MASK}, ["a", {"token": MASK}]],
    }
    assert context == before


@pytest.mark.parametrize("wrong", [None, "hush", ["hush"], 3])
def test_of_what_is_no_dict_nothing_is_shown(wrong: object) -> None:
    assert mask_secrets(wrong) == {}


def test_the_mask_is_that_of_mitogen() -> None:
    assert repr(mitogen.core.Secret("hush")) == MASK


def test_the_arguments_of_the_implicit_context_are_pairs() -> None:
    assert IMPLICIT_SSH_ARGS[::2] == ["-o", "-o"]


@pytest.mark.parametrize("method", METHODS)
def test_the_roles_of_options_are_options(method: str) -> None:
    entry = METHODS[method]
    for name in entry.one_of:
        assert name in entry.options


@pytest.mark.parametrize("method", METHODS)
def test_the_default_user_is_that_of_mitogen(method: str) -> None:
    options_class = mitogen.parent.get_connection_class(method).options_class
    assert user_of({"method_name": method}) == getattr(options_class, "username", None)

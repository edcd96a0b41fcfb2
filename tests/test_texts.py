"""
How contexts are described in logs and exceptions.
"""

from typing import Any

import mitogen.parent
import pytest

from inmanta_plugins.mitogen import settings
from inmanta_plugins.mitogen.contexts.options import METHODS
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
def test_a_hop_is_described(hop: dict[str, Any], description: str) -> None:
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
def test_a_wrong_context_is_described_all_the_same(hop: dict[str, Any]) -> None:
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
    context: dict[str, Any] = {"method_name": "local"}
    context["via"] = context
    assert len(hops_of(context)) == settings.MAX_HOPS + 1
    assert describe_context(context)


@pytest.mark.parametrize("method", METHODS)
def test_the_default_user_is_that_of_mitogen(method: str) -> None:
    options_class = mitogen.parent.get_connection_class(method).options_class
    assert user_of({"method_name": method}) == getattr(options_class, "username", None)

"""
From a model to the dict that a resource carries.
"""

import importlib
import json
import logging
import re
import types
from typing import Any

import inmanta.agent.handler
import pytest
import pytest_inmanta.plugin
from inmanta.execute.proxy import DynamicProxy

from support import IMPLICIT

LOGGER = logging.getLogger(__name__)

Project = pytest_inmanta.plugin.Project

MODEL = """
import std
import mitogen

entity Thing extends std::PurgeableResource:
    string name
end
Thing.host [0:1] -- std::Host
Thing.via [0:1] -- mitogen::Context
implement Thing using std::none

entity Loner:
    string name
end
implement Loner using std::none

entity Named:
    string name
    string host
end
implement Named using std::none

entity Guest:
    string name
end
Guest.host [1] -- Machine
implement Guest using std::none

entity Machine:
    string name
end
Machine.via [0:1] -- mitogen::Context
implement Machine using std::none

bare = std::Host(name="web", ip="10.0.0.1", os=std::linux)
other = std::Host(name="db", ip="10.0.0.2", os=std::linux, via=mitogen::Sudo())
Thing(name="own", host=other, via=mitogen::Local(name="here"))
Thing(name="host", host=other)
Thing(name="implicit", host=bare)
Thing(name="bob", host=std::Host(
    name="bobs", ip="10.0.0.1", os=std::linux, remote_user="bob", remote_port=2222
))
opt = std::OS(name="opt", python_cmd="/opt/python")
Thing(name="/opt/python", host=std::Host(name="opt", ip="10.0.0.1", os=opt))
null_command = std::OS(name="null", python_cmd=null)
Thing(name="python3", host=std::Host(name="null", ip="10.0.0.1", os=null_command))

Thing(name="no host")
Thing(name="no ip", host=std::Host(name="noip", os=std::linux))
Loner(name="loner")
Named(name="named", host="web")
Guest(name="guest", host=Machine(name="machine"))
Guest(name="reached", host=Machine(name="machine", via=mitogen::Local()))

gate = mitogen::Ssh(hostname="gate", port=2222, python_path=["/usr/bin/env", "python3"])
box = mitogen::Podman(container="box", via=mitogen::Sudo(login=false, via=gate))
mitogen::Su(name="chain", username="app", connect_timeout=5, via=box)
ring = mitogen::Local(name="ring", via=mitogen::Sudo(via=ring))

entity Gate extends mitogen::Ssh:
    string hostname = "gate"
    string? username = "probe"
    int? port = 2222
end
implement Gate using parents
Gate(name="gate")
"""

WRONG = {
    "port": ("65536", "an integer from 1 to 65535, not 65536"),
    "python_path": ("[]", "a list of at least one string, none of which is empty, not []"),
    "hostname": ('"-oProxyCommand=x"', "and does not begin with '-', not '-oProxyCommand=x'"),
}
"""Invalid values of attributes, and what is said to be valid."""

Found = dict[str, DynamicProxy]

_instances: Found = {}


@pytest.fixture
def found(request: pytest.FixtureRequest) -> Found:
    """
    The instances of `MODEL` by name. They are only read, so one compilation does for all.
    """
    if not _instances:
        project: Project = request.getfixturevalue("project")
        wrong = [f'Gate(name="wrong {name}", {name}={WRONG[name][0]})' for name in WRONG]
        project.compile(MODEL + "\n".join(wrong))
        kinds = ("Thing", "Loner", "Named", "Guest", "Gate")
        for kind in [*(f"__config__::{kind}" for kind in kinds), "mitogen::Su", "mitogen::Local"]:
            _instances.update({one.name: one for one in project.get_instances(kind)})
    return _instances


@pytest.fixture
def serialize(found: Found) -> types.ModuleType:
    """
    The module as it is loaded now; pytest-inmanta loads plugins anew for each compilation.
    """
    return importlib.import_module("inmanta_plugins.mitogen")


@pytest.mark.parametrize(
    ("name", "context"),
    [
        ("own", {"method_name": "local", "name": "here"}),
        ("host", {"method_name": "sudo", "name": ""}),
        # A host of another kind may have a context too.
        ("reached", {"method_name": "local", "name": ""}),
        ("implicit", IMPLICIT),
        # Another user becomes root by sudo.
        (
            "bob",
            {
                "method_name": "sudo",
                "name": "",
                "via": IMPLICIT | {"name": "bobs", "username": "bob", "port": 2222},
            },
        ),
        ("/opt/python", IMPLICIT | {"name": "opt", "python_path": ["/opt/python"]}),
        ("python3", IMPLICIT | {"name": "null", "python_path": ["python3"]}),
    ],
)
def test_the_context_is_its_own_else_that_of_the_host_else_the_implicit_one(
    found: Found, serialize: types.ModuleType, name: str, context: dict[str, object]
) -> None:
    assert serialize.get_resource_context(found[name]) == context


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no host", "No host relation"),
        ("loner", "No host relation"),
        ("named", "No std::Host entity"),
        ("guest", "No std::Host entity"),
        ("no ip", "No ip"),
    ],
)
def test_where_there_is_no_context_the_error_says_which_part_is_missing(
    found: Found, serialize: types.ModuleType, name: str, reason: str
) -> None:
    with pytest.raises(NotImplementedError) as failure:
        serialize.get_resource_context(found[name])
    assert str(failure.value).startswith(f"[{reason}] ")


def test_a_chain_of_contexts_is_nested_and_holds_what_is_set_alone(
    found: Found, serialize: types.ModuleType
) -> None:
    gate = {
        "method_name": "ssh",
        "name": "",
        "hostname": "gate",
        "port": 2222,
        "python_path": ["/usr/bin/env", "python3"],
    }
    sudo = {"method_name": "sudo", "name": "", "login": False, "via": gate}
    serialized = serialize.serialize_context(found["chain"])
    assert serialized == {
        "method_name": "su",
        "name": "chain",
        "username": "app",
        "connect_timeout": 5,
        "via": {"method_name": "podman", "name": "", "container": "box", "via": sudo},
    }
    assert json.loads(json.dumps(serialized)) == serialized


def test_an_entity_that_extends_a_method_may_declare_its_attributes_again(
    found: Found, serialize: types.ModuleType
) -> None:
    assert serialize.serialize_context(found["gate"]) == {
        "method_name": "ssh",
        "name": "gate",
        "hostname": "gate",
        "username": "probe",
        "port": 2222,
    }


@pytest.mark.parametrize("name", WRONG)
def test_an_invalid_value_is_refused_with_entity_attribute_and_what_is_valid(
    found: Found, serialize: types.ModuleType, name: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(WRONG[name][1])) as failure:
        serialize.serialize_context(found[f"wrong {name}"])
    assert f"'{name}' has to be" in str(failure.value)
    assert "__config__::Gate" in str(failure.value)


def test_what_is_no_context_or_its_own_via_is_not_serialized(
    found: Found, serialize: types.ModuleType
) -> None:
    for wrong in (found["loner"], None, "local", {"method_name": "local"}):
        with pytest.raises(ValueError, match="mitogen::Context"):
            serialize.serialize_context(wrong)
    with pytest.raises(ValueError, match="its own via"):
        serialize.serialize_context(found["ring"])


def test_an_optional_relation_that_is_not_set_is_none_and_one_that_there_is_not_an_error(
    found: Found, serialize: types.ModuleType
) -> None:
    get = serialize.get_optional_relation
    assert get(found["no host"], "via") is None
    assert get(found["no host"], "via", missing_ok=True) is None
    assert get(found["own"], "via").name == "here"
    assert get(found["own"], "name") == "own"
    with pytest.raises(AttributeError):
        get(found["loner"], "via")
    assert get(found["loner"], "via", missing_ok=True) is None


PROBE = """
import std
import mitogen
entity Thing extends std::PurgeableResource:
    string name
    string agent_name = "agent"
end
Thing.via [0:1] -- mitogen::Context
Thing.host [0:1] -- std::Host
implement Thing using std::none
"""

PROBE_PLUGIN = """
import inmanta.resources
import inmanta_plugins.mitogen.abc


@inmanta.resources.resource("probe::Thing", id_attribute="name", agent="agent_name")
class Thing(inmanta_plugins.mitogen.abc.ResourceABC):
    fields = ("name", "agent_name")
"""


@pytest.mark.needs_core(18)
def test_a_reference_is_resolved_by_the_agent_and_not_before(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.create_module("probe", PROBE, PROBE_PLUGIN)
    model = (
        "import mitogen",
        "import probe",
        'secret = std::create_environment_reference("PROBE_PASSWORD")',
        'user = std::create_environment_reference("PROBE_USER")',
        'gate = mitogen::Ssh(hostname="gate", password=secret, ssh_args=["-l", user])',
        'probe::Thing(name="explicit", via=mitogen::Sudo(password=secret, via=gate))',
        'python = std::create_environment_reference("PROBE_PYTHON")',
        'os = std::OS(name="os", python_cmd=python)',
        'probe::Thing(name="implicit", host=std::Host(name="web", ip="10.0.0.1", os=os))',
    )
    project.compile("\n".join(model))
    resources: dict[str, Any] = {id.attribute_value: one for id, one in project.resources.items()}
    exported = json.dumps(resources["explicit"].serialize())
    assert "hush" not in exported
    assert "PROBE_PASSWORD" in exported
    assert resources["explicit"].via["password"] is None
    assert resources["explicit"].via["via"]["password"] is None

    monkeypatch.setenv("PROBE_PASSWORD", "hush")
    monkeypatch.setenv("PROBE_USER", "probe")
    monkeypatch.setenv("PROBE_PYTHON", "/opt/python")

    def resolved(name: str) -> Any:
        resource: Any = project.check_serialization(resources[name])
        resource.resolve_all_references(inmanta.agent.handler.PythonLogger(LOGGER))
        return resource.via

    assert resolved("implicit") == IMPLICIT | {"python_path": ["/opt/python"]}
    assert resolved("explicit") == {
        "method_name": "sudo",
        "name": "",
        "password": "hush",
        "via": {
            "method_name": "ssh",
            "name": "",
            "hostname": "gate",
            "password": "hush",
            "ssh_args": ["-l", "probe"],
        },
    }

    # A plugin may serialize such a context too.
    references = importlib.import_module("inmanta.references")
    serialize = importlib.import_module("inmanta_plugins.mitogen")
    [ssh] = project.get_instances("mitogen::Ssh")
    serialized = serialize.serialize_context(ssh)
    assert isinstance(serialized["password"], references.Reference)
    assert isinstance(serialized["ssh_args"][1], references.Reference)

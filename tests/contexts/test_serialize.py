"""
From a model to the dict that a resource carries.
"""

import collections.abc
import itertools
import json
import logging
import re
import types
from typing import Any

import inmanta.agent.handler
import pytest
import pytest_inmanta.plugin
from inmanta.execute.proxy import DynamicProxy

LOGGER = logging.getLogger(__name__)

Project = pytest_inmanta.plugin.Project
# The class of the resource is made with its module.
Export = collections.abc.Callable[..., Any]

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
"""

IMPLICIT = {
    "method_name": "ssh",
    "name": "web",
    "hostname": "10.0.0.1",
    "username": "root",
    "port": 22,
    "check_host_keys": "ignore",
    "ssh_args": ["-o", "UserKnownHostsFile=/dev/null", "-o", "PasswordAuthentication=no"],
    "python_path": ["python"],
}


@pytest.fixture
def serialize() -> types.ModuleType:
    """
    The module as it is loaded now; pytest-inmanta loads plugins anew for each compilation.
    """
    import inmanta_plugins.mitogen.contexts.serialize

    return inmanta_plugins.mitogen.contexts.serialize


def compiled(project: Project, *expressions: str) -> dict[str, DynamicProxy]:
    """
    The instances of the entities above, by name.
    """
    project.compile(MODEL + "\n".join(expressions))
    return {
        instance.name: instance
        for kind in ("Thing", "Loner", "Named", "Guest")
        for instance in project.get_instances(f"__config__::{kind}")
    }


def test_the_context_is_its_own_else_that_of_the_host_else_the_implicit_one(
    project: Project, serialize: types.ModuleType
) -> None:
    found = compiled(
        project,
        'bare = std::Host(name="web", ip="10.0.0.1", os=std::linux)',
        'other = std::Host(name="db", ip="10.0.0.2", os=std::linux, via=mitogen::Sudo())',
        'Thing(name="own", host=other, via=mitogen::Local(name="here"))',
        'Thing(name="host", host=other)',
        'Thing(name="implicit", host=bare)',
    )
    assert serialize.get_resource_context(found["own"]) == {"method_name": "local", "name": "here"}
    assert serialize.get_resource_context(found["host"]) == {"method_name": "sudo", "name": ""}
    assert serialize.get_resource_context(found["implicit"]) == IMPLICIT


def test_the_implicit_context_of_another_user_becomes_root_by_sudo(
    project: Project, serialize: types.ModuleType
) -> None:
    found = compiled(
        project,
        'web = std::Host(name="web", ip="10.0.0.1", os=std::linux,',
        '    remote_user="bob", remote_port=2222)',
        'Thing(name="thing", host=web)',
    )
    assert serialize.get_resource_context(found["thing"]) == {
        "method_name": "sudo",
        "name": "",
        "via": IMPLICIT | {"username": "bob", "port": 2222},
    }


@pytest.mark.parametrize(
    ("python_cmd", "python_path"),
    [("null", ["python3"]), ('"/opt/python"', ["/opt/python"]), ('"auto"', ["auto"])],
)
def test_the_interpreter_of_the_implicit_context_is_that_of_the_os(
    project: Project, serialize: types.ModuleType, python_cmd: str, python_path: list[str]
) -> None:
    found = compiled(
        project,
        f'os = std::OS(name="os", python_cmd={python_cmd})',
        'Thing(name="thing", host=std::Host(name="web", ip="10.0.0.1", os=os))',
    )
    assert serialize.get_resource_context(found["thing"])["python_path"] == python_path


def test_where_there_is_no_context_the_error_says_which_part_is_missing(
    project: Project, serialize: types.ModuleType
) -> None:
    found = compiled(
        project,
        'Thing(name="no host")',
        'Thing(name="no ip", host=std::Host(name="web", os=std::linux))',
        'Loner(name="loner")',
        'Named(name="named", host="web")',
        'Guest(name="guest", host=Machine(name="machine"))',
    )
    for name, reason in [
        ("no host", "No host relation"),
        ("loner", "No host relation"),
        ("named", "No std::Host entity"),
        ("guest", "No std::Host entity"),
        ("no ip", "No ip"),
    ]:
        with pytest.raises(NotImplementedError) as failure:
            serialize.get_resource_context(found[name])
        assert str(failure.value).startswith(f"[{reason}] ")


def test_a_host_of_another_kind_may_have_a_context_too(
    project: Project, serialize: types.ModuleType
) -> None:
    found = compiled(
        project,
        'Guest(name="guest", host=Machine(name="machine", via=mitogen::Local()))',
    )
    assert serialize.get_resource_context(found["guest"]) == {"method_name": "local", "name": ""}


def test_a_chain_of_contexts_is_nested_and_holds_what_is_set_alone(
    project: Project, serialize: types.ModuleType
) -> None:
    compiled(
        project,
        'gate = mitogen::Ssh(hostname="gate", port=2222, python_path=["/usr/bin/env", "python3"])',
        'box = mitogen::Podman(container="box", via=mitogen::Sudo(login=false, via=gate))',
        'mitogen::Su(name="inner", username="app", connect_timeout=5, via=box)',
    )
    [inner] = project.get_instances("mitogen::Su")
    serialized = serialize.serialize_context(inner)
    assert serialized == {
        "method_name": "su",
        "name": "inner",
        "username": "app",
        "connect_timeout": 5,
        "via": {
            "method_name": "podman",
            "name": "",
            "container": "box",
            "via": {
                "method_name": "sudo",
                "name": "",
                "login": False,
                "via": {
                    "method_name": "ssh",
                    "name": "",
                    "hostname": "gate",
                    "port": 2222,
                    "python_path": ["/usr/bin/env", "python3"],
                },
            },
        },
    }
    assert json.loads(json.dumps(serialized)) == serialized


def test_an_entity_that_extends_a_method_is_serialized_with_its_attributes(
    project: Project, serialize: types.ModuleType
) -> None:
    compiled(
        project,
        "entity Gate extends mitogen::Ssh:",
        '    string hostname = "gate"',
        '    string? username = "probe"',
        "end",
        "implement Gate using parents",
        "Gate(port=2222)",
    )
    [gate] = project.get_instances("__config__::Gate")
    assert serialize.serialize_context(gate) == {
        "method_name": "ssh",
        "name": "",
        "hostname": "gate",
        "username": "probe",
        "port": 2222,
    }


def test_an_entity_that_extends_a_method_may_declare_its_attributes_again(
    project: Project, serialize: types.ModuleType
) -> None:
    compiled(
        project,
        "entity Gate extends mitogen::Ssh:",
        '    string? check_host_keys = "accept"',
        "    int? port = 2222",
        "    int? connect_timeout = 10",
        "    int? ssh_debug_level = 1",
        "    int? keepalive_count = 5",
        "end",
        "implement Gate using parents",
        'Gate(hostname="gate")',
    )
    [gate] = project.get_instances("__config__::Gate")
    assert serialize.serialize_context(gate) == {
        "method_name": "ssh",
        "name": "",
        "hostname": "gate",
        "check_host_keys": "accept",
        "port": 2222,
        "connect_timeout": 10,
        "ssh_debug_level": 1,
        "keepalive_count": 5,
    }


def test_an_invalid_value_is_refused_with_entity_attribute_and_what_is_valid(
    project: Project, serialize: types.ModuleType
) -> None:
    wrong = [
        ("check_host_keys", '"enforced"', "enforce, accept, ignore, not 'enforced'"),
        ("port", "65536", "an integer from 1 to 65535, not 65536"),
        ("connect_timeout", "0", "a number of seconds above 0, not 0"),
        ("keepalive_count", "0", "an integer from 1, not 0"),
        ("python_path", "[]", "a list of at least one string, none of which is empty, not []"),
        ("hostname", '"-oProxyCommand=x"', "does not begin with '-', not '-oProxyCommand=x'"),
    ]
    compiled(
        project,
        'entity Gate extends mitogen::Ssh:\n    string hostname = "h"\nend',
        "implement Gate using parents",
        *(f'Gate(name="{name}", {name}={value})' for name, value, _ in wrong),
    )
    found = {gate.name: gate for gate in project.get_instances("__config__::Gate")}
    for name, _, expected in wrong:
        with pytest.raises(ValueError, match=re.escape(expected)) as failure:
            serialize.serialize_context(found[name])
        assert f"'{name}' has to be" in str(failure.value)
        assert "__config__::Gate" in str(failure.value)


def test_what_is_no_context_is_not_serialized(
    project: Project, serialize: types.ModuleType
) -> None:
    found = compiled(project, 'Loner(name="loner")')
    for wrong in (found["loner"], None, "local", {"method_name": "local"}):
        with pytest.raises(ValueError, match="mitogen::Context"):
            serialize.serialize_context(wrong)


def test_a_context_that_is_reached_via_itself_is_not_serialized(
    project: Project, serialize: types.ModuleType
) -> None:
    compiled(
        project,
        "a = mitogen::Sudo(via=b)",
        'b = mitogen::Ssh(hostname="h", via=a)',
    )
    [ssh] = project.get_instances("mitogen::Ssh")
    with pytest.raises(ValueError, match="its own via"):
        serialize.serialize_context(ssh)


def test_an_optional_relation_is_none_where_it_is_not_set(
    project: Project, serialize: types.ModuleType
) -> None:
    found = compiled(
        project, 'Thing(name="bare")', 'Thing(name="set", via=mitogen::Local(name="here"))'
    )
    get = serialize.get_optional_relation
    assert get(found["bare"], "via") is None
    assert get(found["bare"], "via", missing_ok=True) is None
    assert get(found["set"], "via").name == "here"
    assert get(found["set"], "name") == "set"


def test_a_relation_that_the_type_lacks_is_an_error_unless_that_is_fine(
    project: Project, serialize: types.ModuleType
) -> None:
    found = compiled(project, 'Loner(name="loner")')
    with pytest.raises(AttributeError):
        serialize.get_optional_relation(found["loner"], "via")
    assert serialize.get_optional_relation(found["loner"], "via", missing_ok=True) is None


RESOURCE = """
import inmanta.agent.handler
import inmanta.resources
import inmanta_plugins.mitogen.abc


@inmanta.resources.resource("{module}::Thing", id_attribute="name", agent="agent_name")
class Thing(inmanta_plugins.mitogen.abc.ResourceABC):
    fields = ("name", "agent_name")
"""

RESOURCE_MODEL = """
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


_numbers = itertools.count()


@pytest.fixture
def export(project: Project) -> Export:
    """
    Exports a model with one Thing of a module called probe, and gives that resource.
    """
    # A module stays in the project that the tests share, and can't be made twice.
    module = f"exported{next(_numbers)}"

    def export_one(*expressions: str) -> Any:
        project.compile(
            f"import {module} as probe\nimport mitogen\nimport std\n" + "\n".join(expressions)
        )
        resource = project.get_resource(f"{module}::Thing")
        assert resource is not None
        return resource

    project.create_module(module, RESOURCE_MODEL, RESOURCE.format(module=module))
    return export_one


def test_the_exported_resource_carries_the_context(
    export: Export,
) -> None:
    resource = export(
        'web = std::Host(name="web", ip="10.0.0.1", os=std::linux)',
        'probe::Thing(name="thing", host=web)',
    )
    assert resource.via == IMPLICIT
    assert json.loads(json.dumps(resource.serialize()))["via"] == IMPLICIT


@pytest.mark.needs_core(18)
def test_a_reference_is_resolved_by_the_agent_and_not_before(
    project: Project,
    export: Export,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resource = export(
        'secret = std::create_environment_reference("PROBE_PASSWORD")',
        'user = std::create_environment_reference("PROBE_USER")',
        'gate = mitogen::Ssh(hostname="gate", password=secret, ssh_args=["-l", user])',
        'probe::Thing(name="thing", via=mitogen::Sudo(password=secret, via=gate))',
    )
    exported = json.dumps(resource.serialize())
    assert "hush" not in exported
    assert "PROBE_PASSWORD" in exported
    assert resource.via["password"] is None
    assert resource.via["via"]["password"] is None

    monkeypatch.setenv("PROBE_PASSWORD", "hush")
    monkeypatch.setenv("PROBE_USER", "probe")
    resolved: Any = project.check_serialization(resource)
    resolved.resolve_all_references(inmanta.agent.handler.PythonLogger(LOGGER))
    assert resolved.via == {
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


@pytest.mark.needs_core(18)
def test_the_implicit_context_takes_references(
    project: Project,
    export: Export,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resource = export(
        'python = std::create_environment_reference("PROBE_PYTHON")',
        'os = std::OS(name="os", python_cmd=python)',
        'probe::Thing(name="thing", host=std::Host(name="web", ip="10.0.0.1", os=os))',
    )
    monkeypatch.setenv("PROBE_PYTHON", "/opt/python")
    resolved: Any = project.check_serialization(resource)
    resolved.resolve_all_references(inmanta.agent.handler.PythonLogger(LOGGER))
    assert resolved.via == IMPLICIT | {"python_path": ["/opt/python"]}


@pytest.mark.needs_core(18)
def test_a_plugin_may_serialize_a_context_with_references(
    project: Project, serialize: types.ModuleType
) -> None:
    compiled(
        project,
        'secret = std::create_environment_reference("PROBE_PASSWORD")',
        'mitogen::Ssh(hostname="h", password=secret, ssh_args=["-i", secret])',
    )
    references = pytest.importorskip("inmanta.references")

    [ssh] = project.get_instances("mitogen::Ssh")
    serialized = serialize.serialize_context(ssh)
    assert isinstance(serialized["password"], references.Reference)
    assert isinstance(serialized["ssh_args"][1], references.Reference)

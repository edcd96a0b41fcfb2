"""
The model, the table of options and mitogen agree on what a connection method takes.
"""

import importlib
import inspect
import pkgutil

import mitogen.parent
import pytest
import pytest_inmanta.plugin
from inmanta.ast.attribute import Attribute, RelationAttribute
from inmanta.ast.entity import Entity
from inmanta.execute.proxy import DynamicProxy

from inmanta_plugins.mitogen.contexts.options import METHODS, ONE_OF, SECRET_OPTIONS

# What mitogen passes to itself, and what the model says by other means.
INTERNAL = {"self", "max_message_size", "old_router", "kwargs"}
OF_THE_MODEL = {"method_name", "via"}

# The methods of mitogen that start nothing new on another machine or as another user.
NOT_MODELLED = {"fork", "parent"}

EXAMPLES = {
    "Local": "mitogen::Local()",
    "Ssh": 'mitogen::Ssh(hostname="h")',
    "Sudo": "mitogen::Sudo()",
    "Su": "mitogen::Su()",
    "Doas": "mitogen::Doas()",
    "Docker": "mitogen::Docker()",
    "Podman": 'mitogen::Podman(container="c")',
    "Buildah": 'mitogen::Buildah(container="c")',
    "Kubectl": 'mitogen::Kubectl(pod="p")',
    "Lxc": 'mitogen::Lxc(container="c")',
    "Lxd": 'mitogen::Lxd(container="c")',
    "Incus": 'mitogen::Incus(container="c")',
    "Jail": 'mitogen::Jail(container="c")',
    "Setns": 'mitogen::Setns(container="c", kind="docker")',
}

Project = pytest_inmanta.plugin.Project


def options_of_mitogen(method: str) -> dict[str, inspect.Parameter]:
    """
    Return what the installed mitogen takes for a method, from the signatures of its own classes.
    """
    options_class = mitogen.parent.get_connection_class(method).options_class
    return {
        name: parameter
        for cls in options_class.__mro__
        if "__init__" in vars(cls) and cls is not object
        for name, parameter in inspect.signature(vars(cls)["__init__"]).parameters.items()
        if name not in INTERNAL
    }


def instance_of(project: Project, name: str) -> DynamicProxy:
    """
    Return the instance of that very entity; get_instances also finds those that extend it.
    """
    found = project.get_instances(f"mitogen::{name}")
    [instance] = [one for one in found if one._type().get_full_name() == f"mitogen::{name}"]
    return instance


def attributes_of(kind: Entity) -> dict[str, Attribute]:
    inherited = {
        name: attribute
        for parent in kind.parent_entities
        for name, attribute in attributes_of(parent).items()
    }
    own = {
        name: attribute
        for name, attribute in kind.get_attributes().items()
        if not isinstance(attribute, RelationAttribute)
    }
    return inherited | own


def is_nullable(attribute: Attribute) -> bool:
    return attribute.type.type_string_internal().endswith("?")


_instances: dict[str, DynamicProxy] = {}


@pytest.fixture
def instances(request: pytest.FixtureRequest) -> dict[str, DynamicProxy]:
    """
    An instance of each connection method. They are only read, so one compilation does for all.
    """
    if not _instances:
        project: Project = request.getfixturevalue("project")
        project.compile("\n".join(["import mitogen", *EXAMPLES.values()]))
        _instances.update({name.lower(): instance_of(project, name) for name in EXAMPLES})
    return _instances


@pytest.fixture
def entities(instances: dict[str, DynamicProxy]) -> dict[str, Entity]:
    return {name: instance._type() for name, instance in instances.items()}


def test_every_method_of_mitogen_has_an_entity(entities: dict[str, Entity]) -> None:
    assert set(entities) == set(METHODS)
    names = [module.name for module in pkgutil.iter_modules(mitogen.__path__)]
    methods = {name for name in names if hasattr(connection_module(name), "Connection")}
    assert methods - NOT_MODELLED == set(METHODS) - {"local"}


def connection_module(name: str) -> object:
    try:
        return importlib.import_module(f"mitogen.{name}")
    except Exception:  # one that needs another platform or program to be imported at all
        return None


@pytest.mark.parametrize("method", METHODS)
def test_the_table_of_options_has_what_mitogen_has(method: str) -> None:
    options = options_of_mitogen(method)
    assert set(METHODS[method]) == set(options)
    assert set(ONE_OF.get(method, ())) <= set(options)
    for name, option in METHODS[method].items():
        # podman and buildah give the container a default, and assert that it is not that.
        if options[name].default is inspect.Parameter.empty:
            assert option.required, name


def test_the_secret_options_are_those_that_hold_a_password() -> None:
    assert {"password"} == SECRET_OPTIONS
    # mitogen answers these prompts with it: no method has a password that is not in the table
    with_password = {
        name
        for name in METHODS
        if hasattr(mitogen.parent.get_connection_class(name).options_class, "password")
    }
    assert with_password == {name for name in METHODS if "password" in METHODS[name]}


def test_the_model_and_the_table_of_options_agree_on_options_and_types(
    entities: dict[str, Entity],
) -> None:
    # A dict may have fractions of seconds too: inmanta has no type that takes both 5 and 5.5.
    types = {str: "string", bool: "bool", int: "int", float: "int", list: "string[]"}
    for method, kind in entities.items():
        attributes = attributes_of(kind)
        assert set(attributes) - OF_THE_MODEL == set(METHODS[method]), method
        for name, option in METHODS[method].items():
            written = attributes[name].type.type_string_internal().removesuffix("?")
            assert written == types[option.type], (method, name)


def test_only_what_mitogen_cannot_do_without_is_required(entities: dict[str, Entity]) -> None:
    for method, kind in entities.items():
        nullable = {
            name for name, attribute in attributes_of(kind).items() if is_nullable(attribute)
        }
        required = {name for name, option in METHODS[method].items() if option.required}
        assert set(attributes_of(kind)) - nullable == required | {"method_name", "name"}, method
        assert set(attributes_of(kind)) - set(kind.get_default_values()) == required, method


def test_every_attribute_is_documented_with_its_default(entities: dict[str, Entity]) -> None:
    for kind in entities.values():
        documentation = str(kind.comment)
        for name, attribute in kind.get_attributes().items():
            if isinstance(attribute, RelationAttribute) or name in ("method_name", "name"):
                continue
            _, found, text = documentation.partition(f":attr {name}: ")
            assert found, (str(kind), name)
            text = " ".join(text.partition(":attr ")[0].split())
            assert text.endswith("."), (str(kind), name)
            if is_nullable(attribute):
                assert "default" in text, (str(kind), name)


def test_a_context_sets_its_method_and_nothing_else(instances: dict[str, DynamicProxy]) -> None:
    for method, instance in instances.items():
        assert (instance.method_name, instance.name) == (method, "")
        for attribute, option in METHODS[method].items():
            if attribute != "name" and not option.required:
                assert getattr(instance, attribute) is None, (method, attribute)

"""Which module may import which: read from the source, imports inside functions included."""

import ast
import graphlib
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def modules():
    files = [file for folder in ("mlpmem_jax", "configs", "launch") for file in (ROOT / folder).rglob("*.py")]
    names = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files}
    return {name: file for file, name in names.items()}


def imported(name, file):
    """The names that a module's import statements could mean: modules, and members of modules."""
    package = name.split(".") if file.stem == "__init__" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            outer = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*outer, *filter(None, [node.module])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


@pytest.fixture(scope="module")
def imports():
    """Module of ours -> what it imports: modules of ours by their names, others as they are written."""
    known = modules()

    def module_of(name):
        return next((each for each in (name, name.rpartition(".")[0]) if each in known), name)

    return {name: set(map(module_of, imported(name, file))) - {name} for name, file in known.items()}


def test_no_import_leads_back_to_its_module(imports):
    own = {name: {other for other in others if other in imports} for name, others in imports.items()}
    try:
        tuple(graphlib.TopologicalSorter(own).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_layers_import_downwards_alone(imports):
    for name, others in imports.items():
        tops = {other.split(".")[0] for other in others}
        if name.startswith("mlpmem_jax."):
            assert not tops & {"configs", "launch", "tests"}, name
        if name.startswith("mlpmem_jax.core."):
            own = {other for other in others if other.startswith("mlpmem_jax.")}
            assert all(other.startswith("mlpmem_jax.core") for other in own), name


def test_launchers_import_the_standard_library_configs_and_core_alone(imports):
    allowed = {*sys.stdlib_module_names, "launch", "configs", "yaml", "ml_collections"}
    ours = {"mlpmem_jax.stages", "mlpmem_jax.core.config"}
    core = (
        "accelerators",
        "config_files",
        "errors",
        "failures",
        "installation",
        "preflight",
    )  # none of them imports jax
    ours |= {f"mlpmem_jax.core.{name}" for name in core}
    for name, others in imports.items():
        if name.startswith("launch"):
            assert {other for other in others if other.split(".")[0] not in allowed} <= ours, name


def test_private_parts_of_jax_are_used_in_one_module(imports):
    users = {name for name, others in imports.items() if any(other.startswith("jax._src") for other in others)}
    assert users == {"mlpmem_jax.core.jax_internals"}

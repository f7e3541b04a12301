"""Which module may import which, imports inside functions included, and the names of arrays: read from the source."""

import ast
import graphlib
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def modules():
    files = [file for folder in ("mlpmem_jax", "configs", "launch") for file in (ROOT / folder).rglob("*.py")]
    names = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files}
    return {name: file for file, name in names.items()}


@pytest.fixture(scope="module")
def trees():
    return {name: ast.parse(file.read_text()) for name, file in modules().items()}


def imported(name, file, tree):
    """The names that a module's import statements could mean: modules, and members of modules."""
    package = name.split(".") if file.stem == "__init__" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            outer = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*outer, *filter(None, [node.module])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


@pytest.fixture(scope="module")
def imports(trees):
    """Module of ours -> what it imports: modules of ours by their names, others as they are written."""
    known = modules()

    def module_of(name):
        return next((each for each in (name, name.rpartition(".")[0]) if each in known), name)

    return {name: set(map(module_of, imported(name, file, trees[name]))) - {name} for name, file in known.items()}


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


def test_suffixes_of_arrays_have_the_letters_of_the_table(trees):
    table = (ROOT / "docs" / "architecture.md").read_text().partition("| letter | dimension |")[2].partition("\n\n")[0]
    declared = [cell for line in table.splitlines() for cell in re.findall(r"\| ([A-Z][^|]*?) \| [^|]+", line)]
    dimension = "(?:[A-Za-wyz]1?|[0-9]+)"
    suffix = re.compile(rf"_*[a-z]\w*_(?=\w*[A-Z])({dimension}(?:x{dimension})*)")
    used = {}
    for name, tree in trees.items():
        if name.startswith("mlpmem_jax"):
            for node in ast.walk(tree):
                identifier = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "arg", None)
                if identifier and (match := suffix.fullmatch(identifier)):
                    for letter in re.findall("[A-Za-wyz]", match[1]):
                        used.setdefault(letter, f"{identifier} in {name}")
    assert sorted(declared) == sorted(set(declared)), "a letter is declared twice"
    assert not set(used) - set(declared), [use for letter, use in used.items() if letter not in declared]
    assert not set(declared) - set(used), "a letter is declared that no array has"

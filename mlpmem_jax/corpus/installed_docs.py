"""The built-in default corpus: documentation that is installed with Python and this package's dependencies.

It has topics of `pydoc`, and docstrings of the standard library and of all direct and indirect dependencies of
mlpmem_jax, extracted from the installed source files by `ast`; nothing is imported. Other installed packages can be
added by name. The result depends only on the versions: not on where Python is installed, the order of directory
listings, or which extras are installed.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import importlib.metadata
import inspect
import itertools
import pathlib
import platform
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import packaging.requirements
import packaging.utils

from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.progress import say
from mlpmem_jax.corpus import service_descriptions
from mlpmem_jax.corpus.documents import Document, Part, Source
from mlpmem_jax.corpus.overlap import END, WordNumbers, inside_runs, whole_runs, word_runs

PACKAGE = "mlpmem_jax"
MINIMUM_CHARACTERS = 500
"""Shorter docstrings are mostly labels, not prose, with little context for a language model."""
MINIMUM_LINE = 40
"""Shorter lines may repeat: headings, "Parameters", argument names."""
REPEATED_WORDS = 13
"""A run of this many words that also occurs earlier in the corpus is a repetition, however its lines are wrapped."""

# Parts of the standard library that some systems package separately, and its test suite.
_OMITTED_MODULES = {"distutils", "ensurepip", "idlelib", "lib2to3", "test", "tkinter", "turtledemo"}
# Tests, vendored code of other projects, and code generated from tables.
_OMITTED_FOLDERS = {"test", "tests", "testing", "_vendor", "vendored", "_vendored", "_external", "externals", "mlir"}
_TEST_FILE = re.compile(r"(^|/)(test_[^/]*|[^/]*_test|conftest)\.py$")
_TRIPLE_QUOTE = re.compile(rb'"""|\'\'\'')
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def open_source(packages: str = "") -> Source:
    """The built-in corpus, as one part.

    Args:
      packages: names of installed packages to add, separated by commas; their dependencies are not added.

    Raises:
      UserError: a package is not installed.
    """
    names = tuple(sorted({packaging.utils.canonicalize_name(name) for name in packages.split(",") if name.strip()}))
    versions = {"Python": platform.python_version()}
    versions |= {name: distribution.version for name, distribution in _distributions(names).items()}
    return Source(versions, lambda: [Part("installed documentation", functools.partial(documents, names))])


def _distributions(packages: Sequence[str]) -> dict[str, importlib.metadata.Distribution]:
    """The packages of the corpus: the dependencies, then the added packages, each in order."""
    distributions = dependencies(PACKAGE)
    for name in packages:
        try:
            distributions.setdefault(name, importlib.metadata.distribution(name))
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError(
                f"config.corpus.packages: {name!r} is not installed; install it (for packages with much prose: "
                "pip install 'mlpmem_jax[library]'), or remove it"
            ) from error
    return distributions


def dependencies(package: str) -> dict[str, importlib.metadata.Distribution]:
    """All installed distributions that `package` needs without extras, by normalized name, in order.

    Raises:
      UserError: the package itself is not installed.
    """
    distributions: dict[str, importlib.metadata.Distribution] = {}
    visited, waiting = set(), [(package, frozenset())]
    while waiting:
        name, extras = waiting.pop()
        name = packaging.utils.canonicalize_name(name)
        if (name, extras) in visited:
            continue
        visited.add((name, extras))
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError as error:
            if name == packaging.utils.canonicalize_name(package):
                raise UserError(
                    f"config.corpus.source='installed_docs' needs {package} to be installed (pip install .), to find "
                    "its dependencies; or set config.corpus.source='files'"
                ) from error
            continue  # a dependency that is not for this platform
        distributions[name] = distribution
        for line in distribution.requires or []:
            requirement = packaging.requirements.Requirement(line)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                waiting.append((requirement.name, frozenset(requirement.extras)))
    del distributions[packaging.utils.canonicalize_name(package)]
    return dict(sorted(distributions.items()))


@functools.cache
def documents(packages: tuple[str, ...] = ()) -> tuple[Document, ...]:
    """The documents, each a topic or a docstring of some length, without text that repeats earlier documents.

    `packages` are normalized names of packages to add. Docstrings of one source file are a group. Packages repeat whole
    paragraphs from function to function; with such repetitions, much of a test split would be a copy of the training
    split, and a search would find the answers verbatim.
    """
    distributions = _distributions(packages)
    unique: list[Document] = []
    seen: set[str] = set()
    collects = gc.isenabled()
    gc.disable()  # syntax trees have no cycles, and searching them for cycles costs a third of the time
    try:
        files = itertools.chain(_standard_library(), *map(_files, distributions.values()))
        for group, file in files:
            texts = (_new_lines(seen, text) for text in _prose(file))
            # Topics are in one file, but are articles on different subjects.
            unique += (Document(text, "" if file.name == "topics.py" else group) for text in texts if _is_long(text))
    finally:
        if collects:
            gc.enable()
    unique = [document for document in _without_repeated_runs(unique) if _is_long(document.text)]
    size = sum(len(text.encode()) for text, _ in unique)
    say(
        f"installed documentation: {len(unique):,} documents, {size / 1e6:.1f} MB, from Python "
        f"{platform.python_version()} and {len(distributions)} packages"
    )
    return tuple(unique)


def _new_lines(seen: set[str], text: str) -> str:
    """The text without long lines that are in `seen`; adds its other long lines to `seen`."""
    kept = []
    for line in text.split("\n"):
        words = " ".join(line.split())
        if len(words) < MINIMUM_LINE or words not in seen:
            kept.append(line)
            seen.add(words)
    return "\n".join(kept)


def _without_repeated_runs(texts: Sequence[Document]) -> Iterator[Document]:
    """The documents without lines of which at least half the words are in runs that occur earlier."""
    numbers, words, counts = WordNumbers(), [], []
    for text, _ in texts:
        for line in text.split("\n"):
            line_words = numbers.add(line)
            words += line_words
            counts.append(len(line_words))
        words.append(END)
        counts.append(1)
    words_N = np.array(words)
    _, first = np.unique(word_runs(words_N, REPEATED_WORDS), return_index=True)
    repeated_X = whole_runs(words_N, REPEATED_WORDS)
    repeated_X[first] = False
    inside_N = inside_runs(repeated_X, REPEATED_WORDS, len(words_N))
    line_N = np.repeat(np.arange(len(counts)), counts)
    inside_U = np.bincount(line_N, inside_N, minlength=len(counts))
    keep = iter((2 * inside_U < np.maximum(counts, 1)).tolist())
    for text, group in texts:
        lines = text.split("\n")
        yield Document("\n".join(line for line in lines if next(keep)), group)
        next(keep)  # the end of the document


def _is_long(text: str) -> bool:
    return len(text) >= MINIMUM_CHARACTERS


def _standard_library() -> Iterator[tuple[str, pathlib.Path]]:
    """Source files with their paths relative to the standard library."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    # pydoc_data has the topics, but is not in sys.stdlib_module_names on every platform.
    for name in sorted({*sys.stdlib_module_names, "pydoc_data"} - _OMITTED_MODULES):
        if (root / f"{name}.py").is_file():
            yield f"{name}.py", root / f"{name}.py"
        elif (root / name).is_dir():
            relative = sorted(file.relative_to(root).as_posix() for file in (root / name).rglob("*.py"))
            yield from ((file, root / file) for file in relative if _is_wanted(file))


def _files(distribution: importlib.metadata.Distribution) -> Iterator[tuple[str, pathlib.Path]]:
    """Source files with their paths relative to the site-packages folder."""
    for file in sorted(distribution.files or [], key=str):
        is_read = file.suffix == ".py" or file.name in service_descriptions.FILE_NAMES
        if is_read and _is_wanted(file.as_posix()):
            yield file.as_posix(), pathlib.Path(str(file.locate()))


def _is_wanted(relative: str) -> bool:
    folders = relative.split("/")[:-1]
    # ".." leads to scripts outside of the packages.
    return not (_OMITTED_FOLDERS.intersection(folders) or ".." in folders or _TEST_FILE.search(relative))


def _prose(file: pathlib.Path) -> Iterator[str]:
    """Docstrings, strings passed to numpy's `add_newdoc`, and topics of one source file, above a minimum length.

    For a service description, the texts of its operations and structures.
    """
    if file.name in service_descriptions.FILE_NAMES:
        with contextlib.suppress(OSError, ValueError):  # deleted since, or of another kind
            yield from filter(_is_long, service_descriptions.texts(file))
        return
    try:
        source = file.read_bytes()
    except OSError:
        return  # listed in the package's record, but deleted since
    is_long = any(len(piece) >= MINIMUM_CHARACTERS for piece in _TRIPLE_QUOTE.split(source)[1::2])
    if not is_long and file.name != "topics.py":
        return  # avoids parsing most files, which takes most of the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return  # a template, or code for another Python version
    texts = _topics(tree) if file.name == "topics.py" else _docstrings(tree)
    yield from filter(_is_long, map(inspect.cleandoc, texts))


def _topics(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from _strings(node.value.values)


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.Module, *_DEFINITIONS)):
        yield ast.get_docstring(node, clean=False) or ""
    for field in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, field, ()):
            if isinstance(child, ast.Expr):
                if isinstance(child.value, ast.Call) and _called(child.value) == "add_newdoc":
                    yield from _strings(child.value.args)
            elif isinstance(child, ast.stmt | ast.ExceptHandler):
                yield from _docstrings(child)


def _called(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _strings(nodes: list[ast.expr]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.Tuple | ast.List):
            yield from _strings(node.elts)

import gzip
import importlib.metadata
import json

import pytest

from configs import default
from mlpmem_jax.core.errors import UserError
from mlpmem_jax.corpus import documents, installed_docs, overlap


def prose(name):
    """A long text that begins with its name and shares few words with others."""
    return f"{name}. " + " ".join(f"{name}{index} is for this" for index in range(60))


def install(root, name, requires=(), files=(), extras=()):
    """A distribution as pip leaves it: files, metadata, and a record in no particular order."""
    info = root / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0"]
    lines += [f"Requires-Dist: {line}" for line in requires] + [f"Provides-Extra: {extra}" for extra in extras]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    for path, content in files:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    (info / "RECORD").write_text("".join(f"{path},,\n" for path, _ in files))


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(installed_docs, "PACKAGE", "toy_package")
    monkeypatch.setattr(installed_docs, "_standard_library", lambda: [])
    installed_docs.documents.cache_clear()
    yield tmp_path
    installed_docs.documents.cache_clear()


def docstring(text):
    return f'"""{text}"""\n'


def test_dependencies_follow_markers_and_extras_of_requirements(site):
    install(
        site,
        "toy_package",
        ["Toy.Direct[fast]", "toy_other_platform; sys_platform == 'none'", "toy_extra; extra == 'test'"],
    )
    install(site, "toy_direct", ["toy_fast; extra == 'fast'", "toy_slow; extra == 'slow'"], extras=["fast", "slow"])
    install(site, "toy_fast", ["toy_direct"])
    for name in ("toy_slow", "toy_extra", "toy_other_platform"):
        install(site, name)
    assert list(installed_docs.dependencies("toy_package")) == ["toy-direct", "toy-fast"]


def test_own_dependencies_leave_out_the_extras():
    names = installed_docs.dependencies("mlpmem_jax")
    assert {"jax", "numpy", "scipy", "flax", "optax", "orbax-checkpoint"} <= set(names)
    assert not {"torch", "faiss-cpu", "pytest", "hypothesis", "mlpmem-jax"} & set(names)


def test_a_package_that_is_not_installed():
    with pytest.raises(UserError, match="no_such_package to be installed"):
        installed_docs.dependencies("no_such_package")


def test_documents_are_long_distinct_docstrings_in_a_fixed_order(site):
    module = (
        docstring(prose("Module"))
        + "raise RuntimeError('this file must never be imported')\n"
        + "class Thing:\n    '''" + prose("Thing") + "'''\n"
        + "    def method(self):\n        r'''Method.\n\n        " + prose("m") + "\n          indented\n        '''\n"
        + "try:\n    pass\nexcept ValueError:\n    def hidden():\n        '''" + prose("Hidden") + "'''\n"
        + "def short():\n    '''Short.'''\n"
        + "text = '''No " + prose("docstring") + "'''\n"
        + "add_newdoc('a', 'b', ('c', '''\n    " + prose("Added") + "\n    '''))\n"
    )  # fmt: skip
    files = [
        ("toy/z.py", docstring(prose("Last"))),
        ("toy/a.py", module),
        ("toy/copy.py", docstring(prose("Module"))),
        ("toy/broken.py", docstring(prose("Broken")) + "def (:\n"),
        ("toy/tests/test_a.py", docstring(prose("Test"))),
        ("toy/a_test.py", docstring(prose("Test"))),
        ("toy/_vendor/b.py", docstring(prose("Vendored"))),
    ]
    install(site, "toy_package", ["toy"], [("own.py", docstring(prose("Own")))])
    install(site, "toy", files=files)
    first_words = ["Module.", "Thing.", "Method.", "Hidden.", "Added.", "Last."]
    actual = installed_docs.documents()
    assert [text.split()[0] for text, _ in actual] == first_words
    assert [group for _, group in actual] == ["toy/a.py"] * 5 + ["toy/z.py"]
    assert actual[2].text.splitlines()[-1] == "  indented"  # the indentation of the source is taken off


def service(text):
    """A description as botocore has them: HTML in the documentation of operations, structures and their members."""
    return {
        "documentation": f"<fullname>Toy</fullname><p>{prose(text)}</p>",
        "operations": {"List": {"name": "List", "documentation": "<p>Short.</p>"}},
        "shapes": {
            "Bucket": {
                "type": "structure",
                "members": {
                    "Name": {"documentation": f"<p>The <code>{prose(text + 'name')}</code> &amp; more</p>"},
                    "Tags": {"documentation": "<ul> <li> <p>one</p> </li> <li>two</li></ul>"},
                },
                "documentation": "<p>What a bucket\n   is.</p>",
            }
        },
    }


def test_named_packages_are_added_and_web_services_described_without_markup(site):
    install(site, "toy_package", ["toy"])
    install(site, "toy", files=[("toy/a.py", docstring(prose("Own")))])
    packed = gzip.compress(json.dumps(service("Packed")).encode())
    services = [(f"more/data/s3/{day}/service-2.json.gz", packed) for day in ("2006-03-01", "2007-03-01")]
    files = [("more/b.py", docstring(prose("More"))), ("more/data/s3/paginators-1.json", "{}"), *services]
    install(site, "Toy_More", files=[*files, ("more/data/a/service-2.json", "[1]")])
    assert len(installed_docs.documents()) == 1

    source = installed_docs.open_source("toy.more, ")
    assert source.inputs["toy-more"] == "1.0"
    own, more, whole, bucket = source.parts()[0].read()  # the second service repeats the first
    assert (own.text, more.text) == (prose("Own"), prose("More"))
    assert whole.text == f"Toy\n{prose('Packed')}"
    assert bucket.text == f"The {prose('Packedname')} & more\n\none\ntwo\n\nWhat a bucket is."
    assert whole.group == bucket.group == "more/data/s3/2006-03-01/service-2.json.gz"


def test_a_named_package_that_is_not_installed(site):
    install(site, "toy_package")
    with pytest.raises(UserError, match=r"config\.corpus\.packages: 'toy-absent' is not installed"):
        installed_docs.open_source("toy_absent")


def test_topics_are_documents(tmp_path):
    (tmp_path / "topics.py").write_text(f"topics = {{'b': '{prose('B')}', 'a': '{prose('A')}', 'c': 'short'}}\n")
    assert [text.split()[0] for text in installed_docs._prose(tmp_path / "topics.py")] == ["B.", "A."]


def test_the_standard_library_is_listed_without_tests_and_site_packages():
    listed = list(installed_docs._standard_library())
    assert all(file.as_posix().endswith("/" + name) for name, file in listed)
    files = [file.as_posix() for _, file in listed]
    assert any(file.endswith("/pydoc_data/topics.py") for file in files)
    assert any(file.endswith("/json/decoder.py") for file in files)
    assert not any("/test/" in file or "/tests/" in file or "/site-packages/" in file for file in files)
    assert len(files) == len(set(files)) > 300


def test_a_paragraph_that_is_wrapped_anew_is_removed(site):
    """A copy that no line gives away: its own lines stay, and shorter runs of common words may repeat."""
    copied = prose("copied").split()
    first = prose("first") + "\n\n" + "\n".join(" ".join(copied[i : i + 12]) for i in range(0, len(copied), 12))
    again = prose("again") + "\n\n" + "\n".join(" ".join(copied[i : i + 9]) for i in range(0, len(copied), 9))
    again += "\n\nBut no further: " + " ".join(copied[:12])
    install(site, "toy_package", ["toy"])
    install(site, "toy", files=[("toy/a.py", docstring(first)), ("toy/b.py", docstring(again))])
    one, two = (text for text, _ in installed_docs.documents())
    assert one == first
    assert two.split() == [*prose("again").split(), "But", "no", "further:", *copied[:12]]


def test_little_of_a_split_stands_in_the_others():
    parts = installed_docs.open_source().parts()
    partition = documents.make_partition(parts, default.get_config().corpus)
    train, validation, test = (
        [text for _, text in documents.read_selected(parts, partition, partition.split_N == split)]
        for split in range(3)
    )
    shares = overlap.measure(train, {"validation": validation, "test": test})
    assert max(share["13"] for share in shares.values()) < 0.02
    assert len(test) > 100


def test_versions_are_the_inputs():
    inputs = installed_docs.open_source().inputs
    assert inputs["jax"] == importlib.metadata.version("jax")
    assert inputs["Python"].startswith("3.")


def test_no_long_line_stands_twice_in_the_corpus():
    texts = installed_docs.documents()
    lines = [" ".join(line.split()) for text, _ in texts for line in text.split("\n")]
    long_lines = [line for line in lines if len(line) >= installed_docs.MINIMUM_LINE]
    assert len(long_lines) > 50_000
    assert len(set(long_lines)) == len(long_lines)
    assert len(set(lines)) < len(lines)  # short ones may

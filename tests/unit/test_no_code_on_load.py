"""Nothing of ours reads a file in a way that could run code, or lets an archive choose where it is written."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SOURCES = ("contract", "studies", "sdk", "backend", "worker", "cli", "migrations", "examples")

# Their formats are programs.
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "xmlrpc"}
CALLS = {
    "torch.load",
    "torch.save",
    "torch.hub.load",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "pandas.read_pickle",
    "pd.read_pickle",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.full_load",
    "shutil.unpack_archive",
    "os.system",
    "os.popen",
    "eval",
    "exec",
}
METHODS = {"extractall", "extract"}  # of a tarfile or zipfile: `extractfile` and `read` only read


def forbidden(source: str) -> Iterator[tuple[int, str]]:
    """Line and what stands there."""
    tree = ast.parse(source)
    safe_loaders = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and "yaml.SafeLoader" in map(ast.unparse, node.bases)
    } | {"yaml.SafeLoader"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((node.lineno, name) for name in names if name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.Call) and (problem := _problem(ast.unparse(node.func), node, safe_loaders)):
            yield node.lineno, problem


def _problem(called: str, node: ast.Call, safe_loaders: set[str]) -> str | None:
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if called in CALLS or (called.rpartition(".")[2] in METHODS and "." in called):
        return called
    if called == "yaml.load" and not {given.get("Loader"), *map(ast.unparse, node.args[1:])} & safe_loaders:
        return "yaml.load without a safe loader"
    if called in ("np.load", "numpy.load", "np.fromfile") and given.get("allow_pickle", "False") != "False":
        return f"{called} with allow_pickle"
    return "shell=True" if given.get("shell", "False") != "False" else None


def test_no_source_of_ours_can_run_code_by_reading_a_file() -> None:
    files = [path for part in SOURCES for path in (REPOSITORY / part).rglob("*.py")]
    found = [
        f"{path.relative_to(REPOSITORY)}:{line}: {what}" for path in files for line, what in forbidden(path.read_text())
    ]

    assert len(files) > 200
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch; torch.load('a', weights_only=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.load(text)",
        "np.load('a', allow_pickle=True)",
        "tar.extractall('d')",
        "zipfile.ZipFile('a').extractall('d')",
        "subprocess.run('ls', shell=True)",
        "eval(text)",
    ],
)
def test_each_of_these_would_be_found(source: str) -> None:
    assert len(list(forbidden(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "tar.extractfile(member)",
        "np.load('a')",
        "class L(yaml.SafeLoader): pass\nyaml.load(text, Loader=L)",
        "yaml.safe_load(text)",
    ],
)
def test_what_runs_nothing_is_let_be(source: str) -> None:
    assert list(forbidden(source)) == []

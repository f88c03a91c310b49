"""Folders import each other in one direction only: floors from those below (the table in docs/architecture.md), and the
folders within a floor; sizes stay readable."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "proto": set(),
    "kernels": set(),
    "model": {"kernels", "proto"},
    "kvtransfer": {"kernels", "proto"},
    "worker": {"model", "kvtransfer", "kernels", "proto"},
    "prefill": {"worker", "model", "kvtransfer", "kernels", "proto"},
    "decode": {"worker", "model", "kvtransfer", "kernels", "proto"},
    "cluster": {"prefill", "decode", "worker", "model", "kvtransfer", "kernels", "proto"},
}
MAX_FILES = 12  # of a folder, those in its sub-folders not counted
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# A command declares all its options as parameters: its length is that of its help.
COMMANDS = {"generate", "chat", "jobs_submit", "batch_run"}


def sources(folder: str) -> list[Path]:
    """Of the folder and of those inside it."""
    return [path for path in sorted((ROOT / folder).rglob("*.py")) if "_pb2" not in path.name]


def exempt(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A device kernel is one function by nature, a command one by its options."""
    kernel = any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)
    return kernel or function.name in COMMANDS


def crossings(path: Path) -> Iterator[str]:
    """Folders of ours that a file imports from, its own left out."""
    depth = len(path.relative_to(ROOT).parts)  # how many dots lead out of the file's top folder
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        level = node.level if isinstance(node, ast.ImportFrom) else 0
        if level == depth:
            yield from (name.split(".")[0] for name in names)
        elif level > depth:
            yield "outside"
        elif level == 0 and any(name.split(".")[0] == "isthmus" for name in names):
            yield "an absolute name"


def imported_modules(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports relatively, also for type checking only."""
    own = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = (*own[: len(own) - node.level + 1], *(node.module.split(".") if node.module else ()))
            is_folder = ROOT.joinpath(*module).is_dir()
            yield from ("/".join((*module, alias.name) if is_folder else module) for alias in node.names)


def imported_folders(path: Path) -> Iterator[str]:
    """Folders of ours that a file imports from, also for type checking only; its own left out."""
    folders = {module.rpartition("/")[0] for module in imported_modules(path)}
    yield from folders - {path.relative_to(ROOT).parent.as_posix()}


def test_folders_import_each_other_in_one_direction() -> None:
    graph: dict[str, set[str]] = {}
    for path in (path for floor in ALLOWED for path in sources(floor)):
        folder = path.relative_to(ROOT).parent.as_posix()
        if path.name != "__main__.py":  # nobody imports an entry point
            graph.setdefault(folder, set()).update(imported_folders(path))
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a cycle, each imported by the next: {' -> '.join(error.args[1])}")


def test_a_cpu_s_acceleration_has_one_door() -> None:
    """Who reads how a model runs need not read `model/cpu`: `speed_up.py` is all that others import of it."""
    outside = [path for floor in ALLOWED for path in sources(floor) if path.parent != ROOT / "model/cpu"]
    inside = {of for path in outside for of in imported_modules(path) if of.startswith("model/cpu/")}
    assert inside == {"model/cpu/speed_up"}


def test_folders_have_few_files() -> None:
    counts: dict[str, int] = {}
    for path in (path for floor in ALLOWED for path in sources(floor)):
        folder = path.relative_to(ROOT).parent.as_posix()
        if "/migrations" not in folder:  # they only become more
            counts[folder] = counts.get(folder, 0) + 1
    assert {folder: count for folder, count in counts.items() if count > MAX_FILES} == {}


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_only_from_floors_below(folder: str) -> None:
    wrong = {
        f"{path.relative_to(ROOT)} imports {other}"
        for path in sources(folder)
        for other in crossings(path)
        if other not in ALLOWED[folder]
    }
    assert wrong == set()


@pytest.mark.parametrize("folder", [*ALLOWED, "benchmarks"])
def test_files_are_not_too_long(folder: str) -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources(folder)}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


@pytest.mark.parametrize("folder", [*ALLOWED, "benchmarks"])
def test_functions_are_not_too_long(folder: str) -> None:
    long = {}
    for path in sources(folder):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not exempt(node):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = length
    assert long == {}

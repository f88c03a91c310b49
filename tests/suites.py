"""Which suite a test file is of: by its folder, and by what it imports, itself or through a helper beside it.

    unit     anything else: runs side by side
    model    loads a model in this process, and runs workers around it: side by side too
    process  starts processes, which have deadlines and want the cores: one after the other
    chaos    is in tests/chaos: a target of its own
    pods     is in tests/pods: root and namespaces of its own, by tests/with-pods
    browser  is in tests/browser: Chromium, by tests/with-chromium

Read from the source, so that pytest imports nothing of the suites that are left out: what loads models takes seconds.
"""

import ast
from functools import cache
from pathlib import Path

SUITES = ("unit", "model", "process", "chaos", "image", "pods", "browser")

TESTS = Path(__file__).parent
_FOLDERS = (TESTS, TESTS.parent, TESTS.parent / "benchmarks")  # where helpers are imported from
_PROCESS = {"subprocess", "multiprocessing"}
_MODEL = {"models"}


def suite_of(file: Path) -> str:
    """One of SUITES."""
    for folder in ("chaos", "image", "pods", "browser"):
        if file.is_relative_to(TESTS / folder):
            return folder
    names = imported(file)
    if names & _PROCESS:
        return "process"
    return "model" if names & _MODEL else "unit"


@cache
def imported(file: Path) -> frozenset[str]:
    """Top-level names of the modules that a file imports anywhere, and those that its helpers import."""
    modules = {module for node in ast.walk(ast.parse(file.read_text())) for module in _modules(node)}
    names = {module.partition(".")[0] for module in modules}
    folders = (file.parent, *_FOLDERS)
    paths = {folder.joinpath(*module.split(".")).with_suffix(".py") for module in modules for folder in folders}
    helpers = {path for path in paths if path.is_file() and path != file and path.is_relative_to(TESTS.parent)}
    return frozenset(names.union(*(imported(path) for path in helpers)))


def _modules(node: ast.AST) -> list[str]:
    """Modules that an import may mean, by their dotted names; relative ones as they are seen from the file's folder."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level < 2:
        before = [node.module] if node.module else []
        return before + [".".join([*before, alias.name]) for alias in node.names]
    return []

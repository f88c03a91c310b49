"""Where compiled kernels are kept, in fresh processes: by sources and CPU, and nowhere where nothing can be written."""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from isthmus.kernels.cpu import compiled as module

# A function of one file that calls one of another file; prints what it gives and how often it was found on disk.
CALLER = """
import sys
sys.path.insert(0, sys.argv[1])
from kernels.caller import twice
print(twice(3), sum(twice.stats.cache_hits.values()))
"""
HOMELESS = "from pathlib import Path; Path.home = classmethod(lambda cls: (_ for _ in ()).throw(RuntimeError()));"


def run(code: str, *arguments: str, **environment: str) -> str:
    """What a fresh Python prints."""
    kept = {name: value for name, value in os.environ.items() if name not in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR")}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip() + done.stderr.strip()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A package with two compiled functions."""
    package = tmp_path / "kernels"
    (package / "cpu").mkdir(parents=True)
    for name in ("cpu/compiled.py", "cache_folder.py"):
        shutil.copy(Path(module.__file__).parents[1] / name, package / name)
    use = "from .cpu.compiled import compiled\n"
    (package / "called.py").write_text(use + "@compiled()\ndef once(x):\n    return x + 1\n")
    calls = use + "from .called import once\n@compiled()\ndef twice(x):\n    return once(x) * 2\n"
    (package / "caller.py").write_text(calls)
    return package


def test_another_files_change_is_seen(folder: Path, tmp_path: Path) -> None:
    def answer() -> str:
        return run(CALLER, str(folder.parent), ISTHMUS_CACHE=str(tmp_path / "cache"))

    assert [answer(), answer()] == ["8 0", "8 1"]
    (folder / "called.py").write_text((folder / "called.py").read_text().replace("x + 1", "x + 2"))
    assert [answer(), answer()] == ["10 0", "10 1"]


def test_numbas_own_folder_is_used(folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "numba"
    assert run(CALLER, str(folder.parent), NUMBA_CACHE_DIR=str(own)) == "8 0"
    assert list(own.glob("isthmus-*/*/*.nbi"))
    assert run(CALLER, str(folder.parent), NUMBA_CACHE_DIR=str(own)) == "8 1"


def test_with_nowhere_to_write_kernels_are_compiled_anew(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    printed = run(CALLER, str(folder.parent), ISTHMUS_CACHE=str(tmp_path / "file"))
    assert printed.startswith("8 0") and "set ISTHMUS_CACHE" in printed


def test_a_user_without_a_home(folder: Path, tmp_path: Path) -> None:
    assert run(HOMELESS + CALLER, str(folder.parent), ISTHMUS_CACHE="", TMPDIR=str(tmp_path)) == "8 0"
    assert list(tmp_path.glob("isthmus-*/compiled/isthmus-*/*/*.nbi"))


def test_what_was_not_used_for_long_is_removed(folder: Path, tmp_path: Path) -> None:
    cache, month_ago = tmp_path / "cache", time.time() - 31 * 86_400
    run(CALLER, str(folder.parent), ISTHMUS_CACHE=str(cache))
    (old,) = (cache / "compiled").iterdir()
    (folder / "called.py").write_text((folder / "called.py").read_text() + "\n")
    run(CALLER, str(folder.parent), ISTHMUS_CACHE=str(cache))
    assert len(list((cache / "compiled").iterdir())) == 2
    os.utime(old, (month_ago, month_ago))
    run(CALLER, str(folder.parent), ISTHMUS_CACHE=str(cache))
    (left,) = (cache / "compiled").iterdir()
    assert left != old


def test_processes_that_compile_at_once_keep_all_they_made(folder: Path, tmp_path: Path) -> None:
    """Each for a type of its own, all of them for the same function."""
    kinds = ("int8", "int16", "int32", "int64", "float32", "float64")
    code = CALLER.replace("twice(3)", "twice(__import__('numpy').dtype(sys.argv[2]).type(3))")

    def answer(kind: str) -> str:
        return run(code, str(folder.parent), kind, ISTHMUS_CACHE=str(tmp_path / "cache"))

    with ThreadPoolExecutor(len(kinds)) as threads:
        assert {first.split()[0] for first in threads.map(answer, kinds)} <= {"8", "8.0"}
    assert [answer(kind).split()[1] for kind in kinds] == ["1"] * len(kinds)

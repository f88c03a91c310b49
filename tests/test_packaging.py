"""What is installed is what is in the repository, under the one name `isthmus`."""

import importlib.util
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("cluster", "decode", "kernels", "kvtransfer", "model", "prefill", "proto", "worker")


def test_listed_packages_are_the_folders_with_code() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    with_code = {
        "isthmus." + ".".join(path.parent.relative_to(ROOT).parts)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
    }
    assert set(listed) == with_code


@pytest.mark.parametrize("folder", FOLDERS)
def test_is_no_top_level_package(folder: str) -> None:
    # Ray puts the working directory on every worker's path: a package here would shadow proto-plus' `proto`.
    assert not (ROOT / folder / "__init__.py").exists()


def test_wheel_holds_every_file_under_one_name(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    tree = _copy_of_sources(tmp_path / "tree")
    done = subprocess.run([*build, str(tree)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {
        f"isthmus/{path.relative_to(ROOT)}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".proto", ".pyi", ".mako", ".html")
    }
    assert held == expected


def test_stubs_are_current(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("isthmus_generate_stubs", ROOT / "proto" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.generate(tmp_path)
    fresh = {path.name: path.read_text() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text() for path in (ROOT / "proto").glob("*_pb2*.py*")}
    assert committed == fresh


def _copy_of_sources(target: Path) -> Path:
    """The files that a wheel is built from: a build leaves folders behind, which must not stay in the repository."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        target.mkdir(exist_ok=True)
        (target / name).write_bytes((ROOT / name).read_bytes())
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                copy = target / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
    return target

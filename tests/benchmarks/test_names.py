"""Benchmarks run as files, so that their folder is the first on Python's path: what lies in it hides other modules."""

import sys
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_no_name_hides_another_module() -> None:
    names = {path.stem for path in (ROOT / "benchmarks").iterdir() if path.is_dir() or path.suffix == ".py"}
    ours = {path.parent.name for path in ROOT.glob("*/*.py") if path.parent.name != "benchmarks"}
    assert names.isdisjoint(ours | sys.stdlib_module_names | packages_distributions().keys())

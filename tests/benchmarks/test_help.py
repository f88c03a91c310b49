"""`--help` of the benchmarks fits a terminal."""

import argparse
import ast
from pathlib import Path

import pytest
from support.help import Paragraphs

ROOT = Path(__file__).parents[2]
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_what_a_benchmark_says_of_itself_fits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code = path.read_text()
    text, kind = ast.get_docstring(ast.parse(code)), Paragraphs if "Paragraphs" in code else argparse.HelpFormatter
    shown = argparse.ArgumentParser(prog=path.name, description=text, formatter_class=kind).format_help()
    assert [line for line in shown.splitlines() if len(line) > 80] == []
    assert "RawDescriptionHelpFormatter" not in code


def test_commands_keep_their_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    text = "One two three four five six\nseven.\n\n    python a.py --json out.json  # x\n        --more\n\nEnd."
    parser = argparse.ArgumentParser(prog="a", description=text, formatter_class=Paragraphs, add_help=False)
    assert parser.format_help().split("\n\n")[1:4] == [
        "One two three four five six\nseven.",
        "    python a.py --json out.json  # x\n        --more",
        "End.\n",
    ]

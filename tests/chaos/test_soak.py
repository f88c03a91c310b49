"""The soak benchmark, for one minute: what a longer run looks for must be right from the start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.timeout(600)
def test_a_minute_of_random_load_leaks_nothing_and_changes_no_token(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    done = subprocess.run(
        [sys.executable, str(SOAK), "--minutes", "1", "--json", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        timeout=580,
    )
    result = json.loads(out.read_text())
    assert done.returncode == 0
    assert result["leaked_pages"] == 0
    assert result["rerun"]["differing"] == 0
    assert result["rerun"]["requests"] > 0
    assert not [outcome for outcome in result["outcomes"] if outcome.startswith("error")]
    assert result["rss_mb"]["end"] < result["rss_mb"]["start"] + 600  # pools may still fill; more is a leak

import time

import pytest

from isthmus.model import phases


def test_the_phases_of_a_start_are_counted_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "_phases", {})
    for _ in range(2):
        with phases.phase("load"):
            time.sleep(0.02)
    counters = phases.start_counters()
    assert list(counters) == ["start_load_ms", "start_load_cpu_ms"]
    assert counters["start_load_ms"] >= 40 > counters["start_load_cpu_ms"]

"""What workers take of memory, as people see it."""

from pathlib import Path

import pytest
from models import model_path

from isthmus.cluster.cli.main import run
from isthmus.cluster.cli.memory import memory_lines
from isthmus.model import memory
from isthmus.proto.worker_pb2 import ClusterStatus, MemoryUse, WorkerReport


@pytest.mark.parametrize(
    ("role", "names"),
    [
        ("prefill", ["process", "weights", "KV pages", "activations", "send buffer", "page cache", "in all"]),
        (
            "decode",
            ["process", "weights", "KV pages", "local prompts", "activations", "preempted", "inbox", "forks", "in all"],
        ),
    ],
)
def test_a_dry_run_prints_the_table_and_serves_nothing(
    role: str, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["worker", role, "--model", model_path("tiny-llama"), "--dry-run"]) == 0
    rows = [line.split("  ")[0].strip() for line in capsys.readouterr().out.splitlines()]
    assert rows == [*names, "this machine"]


def test_a_dry_run_of_what_does_not_fit_says_what_to_lower(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "machine_bytes", lambda: 3 << 30)
    (tmp_path / "decode.yaml").write_text("decode_worker: {pool_gib: 0.5, preempt_gib: 0.5}\n")
    arguments = ["worker", "decode", "--model", model_path("tiny-llama"), "--dry-run"]
    assert run([*arguments, "--config", str(tmp_path / "decode.yaml")]) == 0
    assert run(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: INVALID_ARGUMENT: this worker takes up to 4.") and "preempt_gib" in error


def test_lines_of_status_fit_80_columns() -> None:
    use = MemoryUse(name="local prompts", used_bytes=3 << 40, budget_bytes=5 << 40)
    cluster = ClusterStatus(workers=[WorkerReport(worker_id="decode-0", memory=[use])], memory=[use])
    lines = memory_lines(cluster)
    assert lines[0] == "decode-0:" and lines[2] == "gateway:"
    assert lines[1].split() == ["local", "prompts", "3145728.0", "of", "5,242,880", "MiB"]
    assert max(map(len, lines)) <= 80
    assert memory_lines(ClusterStatus(workers=[WorkerReport(worker_id="old")])) == []

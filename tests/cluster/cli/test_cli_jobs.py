"""`isthmus jobs` and `isthmus batch`: what they print, their exit codes, and what Ctrl-C leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import pytest
from scripted import in_thread, scripted_cluster
from served_jobs import QUICK, answering, expected_text, sqlite_url

from isthmus.cluster.cli.main import run
from isthmus.proto.decode_pb2 import DecodeRequest

SEEDED = ("--seed", "1", "--max-tokens", "4")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway with jobs in a thread of its own. Prompts that begin with "slow" take a second for each token."""
    url = sqlite_url(tmp_path_factory.mktemp("jobs"))

    async def script(request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        await answering(1.0 if bytes(request.prompt_token_ids).startswith(b"slow") else 0.0)(request, context)

    with in_thread(scripted_cluster(script, jobs_db=url, jobs=QUICK)) as gateway:
        yield gateway.address


@pytest.fixture(autouse=True)
def chosen(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_SERVER", server)
    monkeypatch.setenv("COLUMNS", "200")


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    code = run(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def submitted(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The id of a new job."""
    code, out, _ = outcome(capsys, "jobs", "submit", *arguments)
    assert code == 0
    return out.strip()


def test_submit_watch_and_result(capsys: pytest.CaptureFixture[str]) -> None:
    job = submitted(capsys, "hi", *SEEDED, "--label", "team=a", "--priority", "interactive")
    text = expected_text("hi", 1, 4)
    assert outcome(capsys, "jobs", "watch", job) == (0, text + "\n", "")
    assert outcome(capsys, "jobs", "result", job) == (0, text + "\n", "")
    code, out, _ = outcome(capsys, "jobs", "result", job, "--json")
    assert (code, json.loads(out)["text"], json.loads(out)["state"]) == (0, text, "JOB_STATE_SUCCEEDED")
    code, out, _ = outcome(capsys, "jobs", "watch", job, "--json", "--from", "2")
    assert [json.loads(line)["number"] for line in out.splitlines()] == ["2", "3", "4", "5", "6", "7"]
    code, out, _ = outcome(capsys, "jobs", "show", job)
    assert code == 0
    for shown in (job, "succeeded", "interactive", "team=a", "1 of 1 answered", "2 prompt, 4 output"):
        assert shown in out
    assert json.loads(outcome(capsys, "jobs", "show", job, "--json")[1])["output_tokens"] == "4"


def test_submit_and_watch_in_one(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = outcome(capsys, "jobs", "submit", "hi", *SEEDED, "--watch")
    assert (code, out.splitlines()[1], err) == (0, expected_text("hi", 1, 4), "")


def test_a_job_of_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prompts = [{"prompt": f"p{number}", "seed": number, "max_tokens": 3} for number in range(3)]
    (tmp_path / "in").write_text("\n".join(map(json.dumps, prompts)))
    job = submitted(capsys, "--jsonl", str(tmp_path / "in"))
    code, out, _ = outcome(capsys, "jobs", "watch", job)
    assert code == 0
    assert outcome(capsys, "jobs", "result", job)[1].split("\n\n")[:3] == [
        f"--- request {number} (length)\n{expected_text(f'p{number}', number, 3)}" for number in range(3)
    ]
    assert sorted(out.split("\n\n")[:3]) == sorted(outcome(capsys, "jobs", "result", job)[1].split("\n\n")[:3])


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    ids = [submitted(capsys, "hi", *SEEDED, "--label", "suite=list", "--label", f"n={n}") for n in range(3)]
    for job in ids:
        outcome(capsys, "jobs", "watch", job)
    code, out, _ = outcome(capsys, "jobs", "list", "--label", "suite=list", "--state", "succeeded", "--since", "1h")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["job", *reversed(ids)]
    code, out, _ = outcome(capsys, "jobs", "list", "--label", "n=1", "--label", "suite=list", "--json")
    assert [json.loads(line)["job_id"] for line in out.splitlines()] == ids[1:2]
    assert len(outcome(capsys, "jobs", "list", "--json", "-n", "2")[1].splitlines()) == 2


def test_cancel_and_delete(capsys: pytest.CaptureFixture[str]) -> None:
    job = submitted(capsys, "slow", "--max-tokens", "100")
    assert outcome(capsys, "jobs", "cancel", job) == (0, "", "")
    code, _, err = outcome(capsys, "jobs", "watch", job)
    assert (code, err) == (1, "the job cancelled\n")
    code, _, err = outcome(capsys, "jobs", "cancel", job)
    assert (code, err.startswith(f"error: FAILED_PRECONDITION: job {job} is CANCELLED")) == (1, True)
    assert outcome(capsys, "jobs", "delete", job) == (0, "", "")
    code, _, err = outcome(capsys, "jobs", "show", job)
    assert (code, err.startswith(f"error: NOT_FOUND: no job '{job}'")) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["jobs", "submit", ""], 1, "error: INVALID_ARGUMENT: the prompt is empty"),
        (["jobs", "submit", "hi", "--priority", "high"], 1, "error: INVALID_ARGUMENT: no priority 'high'; allowed: "),
        (["jobs", "submit", "hi", "--deadline", "soon"], 1, "error: INVALID_ARGUMENT: 'soon' is not a duration"),
        (["jobs", "submit", "hi", "--label", "x"], 2, "error: Invalid value: label 'x' is not KEY=VALUE"),
        (["jobs", "submit", "hi", "--jsonl", __file__], 2, "error: Invalid value: give a prompt or --jsonl, not both"),
        (["jobs", "submit", "--jsonl", __file__], 1, "error: INVALID_ARGUMENT: "),
        (["jobs", "list", "--state", "odd"], 1, "error: INVALID_ARGUMENT: no state 'odd'; allowed: queued, "),
        (["jobs", "watch", "none"], 1, "error: NOT_FOUND: no job 'none'"),
        (["jobs", "result", "none"], 1, "error: NOT_FOUND: no job 'none'"),
        (["jobs", "list", "--server", "127.0.0.1:1"], 1, "error: UNAVAILABLE: no gateway answers at 127.0.0.1:1"),
        (["batch", "run", "/no/such", "-o", "x"], 2, "error: "),
        (
            ["gateway", "--workers", "h:1", "--jobs-db", "nonsense"],
            1,
            "error: INVALID_ARGUMENT: 'nonsense' is not a da",
        ),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, error: str) -> None:
    got, out, err = outcome(capsys, *arguments)
    assert (got, out, err.count("\n")) == (code, "", 1)
    assert err.startswith(error)


def test_watch_from_a_future_event(capsys: pytest.CaptureFixture[str]) -> None:
    job = submitted(capsys, "hi", *SEEDED)
    code, _, err = outcome(capsys, "jobs", "watch", job, "--json", "--from", "1000")
    assert (code, err.startswith("error: OUT_OF_RANGE: ")) == (1, True)


def test_ctrl_c_leaves_the_job_running(capsys: pytest.CaptureFixture[str], server: str) -> None:
    job = submitted(capsys, "slow", *SEEDED)
    program = [sys.executable, "-m", "isthmus.cluster", "jobs", "watch", job]
    watcher = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ, cwd="/")
    assert watcher.stdout is not None
    assert watcher.stdout.read(1) == expected_text("slow", 1, 4)[:1].encode()
    watcher.send_signal(signal.SIGINT)
    _, err = watcher.communicate(timeout=20)
    assert watcher.returncode == 130
    assert f"come back with: isthmus jobs watch {job} --server {server}" in err.decode()
    assert outcome(capsys, "jobs", "watch", job) == (0, expected_text("slow", 1, 4) + "\n", "")


def test_batch_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = [{"prompt": f"p{number}", "seed": number, "max_tokens": 3} for number in range(20)]
    source.write_text("\n".join(map(json.dumps, prompts)) + "\nbad\n")
    code, out, err = outcome(capsys, "batch", "run", str(source), "-o", str(output), "--job-size", "6")
    assert (code, out) == (1, "")
    assert f"20 answered in {output}, 1 failed: {output}.errors.jsonl" in err
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["text"] for answer in answers] == [expected_text(f"p{n}", n, 3) for n in range(20)]
    error = json.loads(Path(f"{output}.errors.jsonl").read_text())
    assert (error["line"], error["error"]["code"]) == (21, "INVALID_ARGUMENT")
    code, out, err = outcome(capsys, "batch", "run", str(source), "-o", str(output))
    assert (code, err) == (
        1,
        f"error: FAILED_PRECONDITION: {output} is there already: remove it, or name another output\n",
    )


def test_batch_run_goes_on_after_ctrl_c(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = [{"prompt": f"{'slow' if number == 3 else 'p'}{number}", "max_tokens": 2} for number in range(6)]
    source.write_text("\n".join(map(json.dumps, prompts)))
    arguments = ["batch", "run", str(source), "-o", str(output), "--job-size", "2"]
    first = subprocess.Popen([sys.executable, "-m", "isthmus.cluster", *arguments], stderr=subprocess.PIPE, cwd="/")
    end = time.monotonic() + 20
    while not output.exists() or not output.stat().st_size:
        assert time.monotonic() < end
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=20)
    assert (first.returncode, "the same command again goes on from here" in err.decode()) == (130, True)
    code, out, _ = outcome(capsys, *arguments, "--json")
    assert (code, json.loads(out)) == (0, {"answered": 6, "failed": 0, "errors": None})
    assert [json.loads(line)["line"] for line in output.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "command",
    [*(("jobs", name) for name in ["submit", "list", "show", "watch", "result", "cancel", "delete"]), ("batch", "run")],
)
def test_every_command_has_help_with_examples(command: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capsys, *command, "--help")
    assert code == 0
    assert "Examples" in out
    assert f"isthmus {' '.join(command)}" in out

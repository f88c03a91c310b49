"""The command line: exit codes, one line for an error, what is printed; against a gateway of scripted workers."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from scripted import in_thread, says, scripted_cluster

from isthmus.cluster.cli.gateway import GATEWAY_FLAGS
from isthmus.cluster.cli.main import run
from isthmus.cluster.config import ClusterConfig
from isthmus.cluster.frontend.gateway import Gateway
from isthmus.cluster.gateway_config import GatewayConfig
from isthmus.cluster.router.policies import Policy
from isthmus.proto.errors import Unavailable

TENANTS = "error: INVALID_ARGUMENT: gateway.tenant_weights: "
LISTEN, ADVERTISE = "error: Invalid value for --listen: ", "error: Invalid value for --advertise: "
COMMANDS = (
    *("up", "generate", "chat", "status", "models", "calibrate", "demo", "worker", "gateway"),
    *("drain", "flip", "scale", "config"),
)


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    """A gateway that always answers "hello", in a thread of its own."""
    with in_thread(scripted_cluster(says("hello"))) as running:
        yield running


@pytest.fixture
def server(gateway: Gateway) -> str:
    return gateway.address


@pytest.fixture
def admin(gateway: Gateway) -> str:
    return gateway.admin_address


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    code = run(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_generate_streams_the_text(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(capsys, "generate", "--server", server, "hi") == (0, "hello\n", "")


def test_generate_stats_go_to_stderr(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = outcome(capsys, "generate", "--server", server, "--stats", "hi")
    assert (code, out) == (0, "hello\n")
    assert "2 prompt + 5 output tokens (length)" in err
    assert "4.00x smaller" in err


def test_generate_json(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--json", "--chat", "--seed", "4", "--codec", "raw", "--request-id", "mine")
    code, out, _ = outcome(capsys, "generate", "--server", server, *arguments, "hi")
    answer = json.loads(out)
    assert (code, answer["text"], answer["seed"], answer["request_id"]) == (0, "hello", 4, "mine")
    assert answer["usage"] == {"prompt_tokens": len("<user>hi"), "output_tokens": 5}


def test_generate_several_answers(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("generate", "--server", server, "--n", "3", "--seed", "7", "--logit-bias", "42=-1.5", "hi")
    assert outcome(capsys, *arguments) == (0, "[1] hello\n[2] hello\n[3] hello\n", "")
    code, out, _ = outcome(capsys, *arguments, "--json")
    answer = json.loads(out)
    assert (code, answer["seed"], [choice["seed"] for choice in answer["choices"]]) == (0, 7, [7, 8, 9])
    assert answer["usage"] == {"prompt_tokens": 2, "output_tokens": 15}


def test_generate_from_a_file(server: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("näive", encoding="utf-8")
    code, out, _ = outcome(capsys, "generate", "--server", server, "--json", "--file", str(tmp_path / "prompt.txt"))
    assert (code, json.loads(out)["usage"]["prompt_tokens"]) == (0, 6)


def test_status(admin: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capsys, "status", "--admin", admin)
    assert code == 0
    heading, prefill, decode, last = out.splitlines()
    assert " · access: loopback" in last
    assert heading.split() == ["worker", "role", "health", "run", "wait", "pages", "address"]
    assert prefill.split()[:6] == ["prefill-0", "prefill", "ready", "0", "0", "0%"]
    assert decode.split()[:3] == ["decode-0", "decode", "ready"]
    assert last.startswith("isthmus ")
    code, out, _ = outcome(capsys, "status", "--admin", admin, "--verbose")
    assert code == 0 and "prefixes" in out
    code, out, _ = outcome(capsys, "status", "--admin", admin, "--json")
    assert [worker["worker_id"] for worker in json.loads(out)["workers"]] == ["prefill-0", "decode-0"]


def test_generate_goes_on_after_the_beginning_of_an_answer(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capsys, "generate", "--server", server, "--json", "--chat", "--answer-prefix", "Well,", "hi")
    assert code == 0
    assert json.loads(out)["usage"]["prompt_tokens"] == len("<user>hi<assistant>Well,...")
    code, _, err = outcome(capsys, "generate", "--server", server, "--answer-prefix", "Well,", "hi")
    assert (code, "an answer has a prefix in a chat only" in err) == (2, True)


def test_chat_sends_the_whole_conversation(
    server: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["one", "", "two", "/exit", "three"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    code, out, err = outcome(capsys, "chat", "--server", server, "--system", "s", "--stats")
    assert (code, out) == (0, "hello\nhello\n")
    first, second = len("<system>s<user>one"), len("<system>s<user>one<assistant>hello<user>two")
    assert [int(line.split()[0]) for line in err.splitlines()] == [first, second]


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capsys, "models", "--json")
    listed = {model["name"]: model for model in json.loads(out)}
    assert code == 0
    assert listed["smollm2-135m"]["installed"]


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["generate", ""], 1, "error: INVALID_ARGUMENT: the prompt is empty; allowed: at least one character"),
        (["generate", "hi", "--codec", "zip"], 1, "error: NOT_FOUND: no codec 'zip'; allowed: raw, tq-k4v4"),
        (["generate", "hi", "--model", "m"], 1, "error: NOT_FOUND: no model 'm' here; available: bytes"),
        (["generate", "hi", "--top-p", "3"], 1, "error: INVALID_ARGUMENT: top_p is 3; allowed: (0, 1]"),
        (["generate", "hi", "--file", __file__], 2, "error: "),
        (["generate", "hi", "--top-k", "-3"], 2, "error: "),
        (["generate", "hi", "--nonsense"], 2, "error: "),
        (["generate", "--file", "/no/such/file"], 1, "error: INVALID_ARGUMENT: /no/such/file cannot be read"),
        (["nonsense"], 2, "error: "),
        (["up", "--prefill", "0"], 2, "error: "),
        (["up", "--codec", "zip"], 1, "error: INVALID_ARGUMENT: codec is 'zip': no codec 'zip'; allowed: "),
        (["up", "--log-level", "loud"], 2, "error: "),
        (["gateway", "--workers", "nowhere"], 2, "error: "),
        (["gateway"], 2, "error: Invalid value: no workers: name them with --workers, or as workers: under gateway: "),
        (["gateway", "--workers", "h:1", "--model", "/no/model"], 1, "error: NOT_FOUND: "),
        (["gateway", "--workers", "h:1", "--policy", "x"], 1, "error: INVALID_ARGUMENT: gateway.policy is 'x': "),
        (["gateway", "--workers", "h:1", "--tenant-weights", "a"], 2, "error: "),
        (["gateway", "--workers", "h:1", "--tenant-weights", "a=-1"], 1, TENANTS),
        (["up", "--overcommit", "0"], 2, "error: Invalid value for --overcommit: 0.0 is not in the range x>0."),
        (["up", "--overcommit", "inf"], 1, "error: INVALID_ARGUMENT: gateway.overcommit is inf: "),
        (
            ["worker", "prefill", "--listen", "nowhere"],
            2,
            f"{LISTEN}'nowhere' is not host:port",
        ),
        (
            ["worker", "decode", "--listen", "::1:7001"],
            2,
            f"{LISTEN}'::1:7001' is not host:port",
        ),
        (
            ["worker", "prefill", "--advertise", "10.0.0.7"],
            2,
            f"{ADVERTISE}'10.0.0.7' is not host:port",
        ),
        (
            ["worker", "prefill", "--advertise", "10.0.0.7:0"],
            2,
            f"{ADVERTISE}'10.0.0.7:0' is not host:port",
        ),
        (["gateway", "--workers", "h:0"], 2, "error: Invalid value for --workers: 'h:0' is not host:port"),
        (["gateway", "--listen", "x"], 2, f"{LISTEN}'x' is not host:port"),
        (
            ["worker", "decode", "--advertise", "0.0.0.0:1"],
            2,
            f"{ADVERTISE}'0.0.0.0:1' cannot",
        ),
        (["status", "--admin", "nowhere"], 2, "error: Invalid value for --admin: 'nowhere' is not host:port"),
        (["generate", "--server", "nowhere", "x"], 2, "error: Invalid value for --server: 'nowhere' is not host:port"),
        (["up", "--host", "a b"], 1, "error: INVALID_ARGUMENT: host is 'a b': 'a b:0' is not host:port"),
        (["drain", "nobody"], 1, "error: NOT_FOUND: no worker 'nobody'; there are: prefill-0, decode-0"),
        (["flip", "decode-0", "prefill"], 1, "error: FAILED_PRECONDITION: decode-0 is the only worker of its role"),
        (["flip", "decode-0", "cook"], 2, "error: "),
        (["scale", "decode=3"], 1, "error: FAILED_PRECONDITION: this gateway was given a list of workers"),
        (["scale", "decode"], 2, "error: "),
        (["generate", "--logit-bias", "a=1", "x"], 2, "error: Invalid value for --logit-bias: 'a=1'; allowed: TOKEN="),
        (["generate", "--logit-bias", "300=1", "x"], 1, "error: INVALID_ARGUMENT: logit_bias has token id 300"),
        (["generate", "--n", "65", "x"], 1, "error: INVALID_ARGUMENT: n is 65; allowed: 1 to 64"),
        (["scale", "decode=1", "decode=2"], 2, "error: "),
    ],
)
def test_mistakes(
    gateway: Gateway,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    error: str,
) -> None:
    monkeypatch.setenv("ISTHMUS_SERVER", gateway.address)
    monkeypatch.setenv("ISTHMUS_ADMIN", gateway.admin_address)
    got, out, err = outcome(capsys, *arguments)
    assert (got, out) == (code, "")
    assert err.startswith(error)
    assert err.count("\n") == 1


def test_a_file_that_is_not_utf8(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"ab\xff")
    code, _, err = outcome(capsys, "generate", "--file", str(tmp_path / "bad"))
    assert code == 1
    assert err == (
        f"error: INVALID_ARGUMENT: {tmp_path}/bad is not UTF-8 text (byte 0xff at offset 2); allowed: UTF-8\n"
    )


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = outcome(capsys, "status", "--admin", "127.0.0.1:1")
    assert code == 1
    assert err.startswith("error: UNAVAILABLE: no gateway answers at 127.0.0.1:1; start one with `isthmus up`")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {"worker": ("prefill", "decode"), "config": ("show", "schema")}
    names = [(command, part) for part in parts[command]] if command in parts else [(command,)]
    for name in names:
        code, out, _ = outcome(capsys, *name, "--help")
        assert code == 0
        assert "Examples" in out
        assert f"isthmus {' '.join(name)}" in out


def test_help_shows_defaults_bounds_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = outcome(capsys, "up", "--help")
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", out).split())
    assert "[default: (" not in out
    for text in ("N [0<=x<=1024]", "[default: 1]", "[default: 50051]", "GIB [x>0]", "N [x>0]", "S [x>=0]"):
        assert text in shown
    for policy in get_args(Policy):
        assert policy in shown


def command(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    program = [sys.executable, "-m", "isthmus.cluster", *arguments]
    return subprocess.run(program, input=stdin, capture_output=True, check=False, timeout=60, cwd="/")


@pytest.mark.parametrize("name", ["up", "gateway"])
def test_settings_of_the_gateway_are_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = outcome(capsys, name, "--help")
    no_flags = {"access", "http", "http_listen", "jobs", "jobs_db", "workers", "supervisor", "wait_for_scale"}
    settings = set(GatewayConfig.model_fields) - no_flags
    assert {flag.setting for flag in GATEWAY_FLAGS} == {f"gateway.{setting}" for setting in settings}
    for setting in settings:
        assert f"--{setting.replace('_', '-')}"[:13] in out  # narrow terminals cut names


def test_flags_of_the_gateway_reach_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[GatewayConfig] = []

    def serves(settings: ClusterConfig, begun_s: float) -> int:
        given.append(settings.gateway)
        return 0

    def gateway(listen: str, model: object, workers: list[str], config: GatewayConfig, **_: object) -> None:
        given.append(config)
        raise Unavailable("not started")

    monkeypatch.setattr("isthmus.cluster.cli.up._serve_cluster", serves)
    monkeypatch.setattr("isthmus.cluster.frontend.gateway.Gateway", gateway)
    monkeypatch.setattr("isthmus.cluster.text.served.load_served_model", lambda name, *_: name)
    (tmp_path / "c.yaml").write_text("gateway:\n  replays: 3\n  overcommit: 4\n")
    flags = ["--policy", "least-requests", "--local-prefill", "never", "--replays", "2", "--max-request-s", "1.5"]
    flags += ["--tenant-weights", "a=2,b=0.5", "--tenant-weights", "c=1", "--no-preflight"]
    assert run(["up", "--config", str(tmp_path / "c.yaml"), *flags]) == 0
    assert run(["gateway", "--workers", "h:1", *flags]) == 1
    for config in given:
        assert (config.policy, config.local_prefill, config.replays) == ("least-requests", "never", 2)
        assert config.tenant_weights == {"a": 2, "b": 0.5, "c": 1}
        assert (config.max_request_s, config.preflight, config.max_waiting) == (1.5, False, 256)
    assert [config.overcommit for config in given] == [4, 2]


def test_help_imports_nothing_heavy() -> None:
    heavy = "torch ray transformers grpc google.protobuf tokenizers numpy pydantic yaml rich.progress"
    code = (
        "import sys; from isthmus.cluster.cli.main import run; run(['--version']);"
        f"print(*(name for name in {heavy.split()!r} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.splitlines()[1] == ""


def test_prompt_from_a_pipe(server: str) -> None:
    done = command("generate", "--server", server, "--json", stdin="näive".encode())
    assert (done.returncode, json.loads(done.stdout)["usage"]["prompt_tokens"]) == (0, 6)
    done = command("generate", "--server", server, "-", stdin=b"\xff")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"error: INVALID_ARGUMENT: stdin is not UTF-8 text")


def test_a_reader_that_goes_away_is_no_error_message(server: str) -> None:
    read, write = os.pipe()
    os.close(read)
    program = [sys.executable, "-m", "isthmus.cluster", "generate", "--server", server, "hi"]
    done = subprocess.run(program, stdout=write, stderr=subprocess.PIPE, check=False, timeout=60, cwd="/")
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")

"""Where settings come from: the order of sources, names of variables, mistakes told with their source."""

import json
import re
from pathlib import Path

import pytest

from isthmus.cluster.cli.main import run
from isthmus.cluster.config import ClusterConfig, load, load_config
from isthmus.cluster.sources import VARIABLES, settings_of
from isthmus.proto.errors import InvalidRequest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ISTHMUS_TLS")


def written(folder: Path, text: str) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return path


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "port: 1\nprefill: 2\ndecode: 3\ngateway: {replays: 1, max_waiting: 2, overcommit: 3}\n")
    for name, value in {"PORT": "10", "PREFILL": "20", "GATEWAY__REPLAYS": "10", "GATEWAY__MAX_WAITING": "20"}.items():
        monkeypatch.setenv(f"ISTHMUS_{name}", value)
    loaded = load(path, {"port": 100, "gateway": {"replays": 100, "policy": None}})
    config = loaded.config
    assert (config.port, config.prefill, config.decode) == (100, 20, 3)
    assert (config.gateway.replays, config.gateway.max_waiting, config.gateway.overcommit) == (100, 20, 3)
    origins = {".".join(setting): (origin.kind, origin.name) for setting, origin in loaded.origins.items()}
    assert origins == {
        "port": ("flag", "--port"),
        "prefill": ("environment", "ISTHMUS_PREFILL"),
        "decode": ("file", str(path)),
        "gateway.replays": ("flag", "--replays"),
        "gateway.max_waiting": ("environment", "ISTHMUS_GATEWAY__MAX_WAITING"),
        "gateway.overcommit": ("file", str(path)),
        "gateway.jobs_db": ("environment", "ISTHMUS_JOBS_DB"),  # of all tests (conftest.py)
    }


@pytest.mark.parametrize(
    ("name", "value", "setting", "expected"),
    [
        ("CODECS", "raw, fp8", ("codecs",), ("raw", "fp8")),
        ("CODECS", '["raw"]', ("codecs",), ("raw",)),
        ("THREADS", "", ("threads",), None),
        ("DEVICE", "cuda:1", ("device",), "cuda:1"),
        ("GATEWAY__WORKERS", "a:1,b:2", ("gateway", "workers"), ("a:1", "b:2")),
        ("GATEWAY__TENANT_WEIGHTS", "a=2,b=0.5", ("gateway", "tenant_weights"), {"a": 2, "b": 0.5}),
        ("GATEWAY__TENANT_WEIGHTS__WEB", "3", ("gateway", "tenant_weights"), {"web": 3}),
        ("GATEWAY__PREFLIGHT", "false", ("gateway", "preflight"), False),
        ("GATEWAY__JOBS__MAX_RUNNING", "7", ("gateway", "jobs", "max_running"), 7),
        ("GATEWAY", '{"replays": 5}', ("gateway", "replays"), 5),
        ("DECODE_WORKER__POOL_GIB", "0.5", ("decode_worker", "pool_gib"), 0.5),
        ("JOBS_DB", "sqlite:////x", ("gateway", "jobs_db"), "sqlite:////x"),
        ("GATEWAY__JOBS_DB", "sqlite:////y", ("gateway", "jobs_db"), "sqlite:////y"),
    ],
)
def test_every_setting_is_a_variable(
    name: str, value: str, setting: tuple[str, ...], expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ISTHMUS_{name}", value)
    loaded = load(None, {})
    assert loaded.config.value(setting) == expected
    if value:
        assert loaded.origins[setting].name in (f"ISTHMUS_{name}", "ISTHMUS_GATEWAY__TENANT_WEIGHTS", "ISTHMUS_JOBS_DB")


@pytest.mark.parametrize(
    ("text", "variables", "flags", "message"),
    [
        ("decode: -1", {}, {}, "decode is -1: Input should be greater than or equal to 0 (from {file})"),
        ("", {"DECODE": "many"}, {}, "decode is 'many': Input should be a valid integer, "),
        ("", {"DECODE": "-1"}, {}, "(from ISTHMUS_DECODE)"),
        ("decode: 2", {}, {"decode": -1}, "decode is -1: Input should be greater than or equal to 0 (from --decode)"),
        ("", {}, {"decode_worker": {"default_codec": 3}}, "(from --codec)"),
        ("", {"GATEWAY__REPLAY": "3"}, {}, "gateway: unknown key 'replay' (did you mean 'replays'?); allowed: "),
        (
            "decode_worker: {codec: raw}",
            {},
            {},
            "unknown key 'codec' (did you mean 'default_codec'?); allowed: ",
        ),
        ("gateway: {codec: raw}", {}, {}, "gateway: unknown key 'codec'; allowed: workers, "),
        ("gateway: {workers: [foo]}", {}, {}, "gateway.workers: 'foo' is not host:port, "),
        ("gateway: {workers: ['h:0']}", {}, {}, "gateway.workers: 'h:0' is not host:port, "),
        ("drain_s: .inf", {}, {}, "drain_s is inf: Input should be a finite number (from {file})"),
        (
            "",
            {"GATEWAY__RESTART_WAIT_S": "nan"},
            {},
            "gateway.restart_wait_s is 'nan': Input should be a finite",
        ),
        ("gateway: {tenant_weights: {a: .inf}}", {}, {}, "gateway.tenant_weights.a is inf: Input should be a finite"),
        ("gateway: {jobs: {lease_s: .nan}}", {}, {}, "gateway.jobs.lease_s is nan: Input should be a finite number"),
        ("prefill: true", {}, {}, "prefill is True: a number is wanted here (from {file})"),
        ("decode_worker: {pool_tokens: no}", {}, {}, "decode_worker.pool_tokens is False: a number is wanted here"),
        ("gateway: {overcommit: yes}", {}, {}, "gateway.overcommit is True: a number is wanted here"),
        ("", {"GATEWAY__REPLAY": "3"}, {}, "(from ISTHMUS_GATEWAY__REPLAY)"),
        ("", {"GATEWAY__TENANT_WEIGHTS": "a"}, {}, "gateway.tenant_weights is 'a': 'a' is not NAME=WEIGHT (from "),
        ("gateway: 3", {"GATEWAY__REPLAYS": "3"}, {}, "gateway is 3: Input should be a valid dictionary"),
        ("prefill_worker: {page_tokens: 128, chunk_tokens: 64}", {}, {}, "page_tokens (128) (from {file})"),
    ],
)
def test_a_mistake_is_told_with_its_source(
    text: str,
    variables: dict[str, str],
    flags: dict[str, object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"ISTHMUS_{name}", value)
    path = written(tmp_path, text)
    with pytest.raises(InvalidRequest) as raised:
        load_config(path, flags)
    assert message.format(file=path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_batch: 4", "key 'max_batch' belongs under decode_worker: (from "),
        ("pool_gib: 4", "key 'pool_gib' belongs under prefill_worker: or decode_worker: (from "),
        ("replays: 4", "key 'replays' belongs under gateway: (from "),
    ],
)
def test_a_file_of_one_worker_says_where_its_settings_go(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as raised:
        load_config(written(tmp_path, text), {})
    assert str(raised.value).startswith(message)


def test_a_section_without_settings_is_none(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "gateway:\nprefill_worker: {}\n"), {}).gateway.replays == 16


def test_settings_of_all_workers_and_of_a_role(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "model: m\ncodec: raw\nstore_dir: /s\nthreads: 3\nprefill_worker: {threads: 4}\ndecode_worker: {dtype: fp32}\n",
    )
    config = load_config(path, {})
    shared = {"model": "m", "default_codec": "raw", "listen": "127.0.0.1:0"}
    assert config.process_settings("prefill", default_threads=1) == {**shared, "threads": 4, "store_dir": "/s"}
    assert config.process_settings("decode", default_threads=1) == {**shared, "threads": 3, "dtype": "fp32"}
    assert load_config(None, {}).process_settings("decode", default_threads=5)["threads"] == 5


def test_variables_that_set_nothing_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (*VARIABLES, "ISTHMUS_GATEWAY__TENANT_WEIGHTS__WEB"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("ISTHMUS_CONFIG")
    # A Service called "isthmus" in Kubernetes.
    for name in ("PORT", "PORT_50051_TCP", "SERVICE_HOST", "SERVICE_PORT_GRPC", "GATEWAY_PORT"):
        monkeypatch.setenv(f"ISTHMUS_{name}", "tcp://10.0.0.1:50051")
    monkeypatch.setenv("ISTHMUS_PROT", "7000")
    assert run(["config", "show"]) == 0
    shown = capsys.readouterr()
    warnings = [json.loads(line)["message"] for line in shown.err.splitlines()]
    assert warnings == ["the variable ISTHMUS_PROT is unknown and sets nothing; the nearest known one is ISTHMUS_PORT"]
    assert re.search(r"^port +default +50051$", shown.out, re.MULTILINE)


def test_every_variable_in_the_code_is_known() -> None:
    known = {*VARIABLES, *("ISTHMUS_" + "__".join(setting).upper() for setting in settings_of(ClusterConfig))}
    folders = ("cluster", "worker", "prefill", "decode", "model", "kvtransfer", "kernels", "proto", "benchmarks")
    named = {
        name
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        for name in re.findall(r"\bISTHMUS_[A-Z0-9_]*[A-Z0-9]\b", path.read_text())
    }
    assert named - known == set()


def test_the_example_in_the_documentation_is_one(tmp_path: Path) -> None:
    blocks = [
        block
        for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for block in re.findall(r"```ya?ml\n(.*?)```", path.read_text(), re.DOTALL)
    ]
    assert blocks
    for block in blocks:
        config = load_config(written(tmp_path, block), {})
        assert config.model_fields_set

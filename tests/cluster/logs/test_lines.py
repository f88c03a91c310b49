"""With log_format: json all lines of a process are JSON: those for people, of libraries, warnings, exceptions."""

import json
import logging
import threading
import warnings
from collections.abc import Iterator

import pytest

from isthmus.cluster.cli.terminal import options
from isthmus.cluster.config import ClusterConfig
from isthmus.cluster.launch.progress import StartProgress
from isthmus.cluster.logs.configure import take_over

GRPC = logging.getLogger("grpc._cython.cygrpc")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, hook = list(root.handlers), threading.excepthook
    yield
    logging.captureWarnings(False)
    root.handlers[:], threading.excepthook = handlers, hook
    GRPC.filters.clear()
    options.configure_logs("warning")


def messages(capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    return [(line["level"], line["message"]) for line in lines]


def test_lines_for_people_are_lines_of_the_log_where_that_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    options.configure_logs("error", ClusterConfig(log_format="json"), audit=False)
    options.say("ready on 127.0.0.1:7000")
    with StartProgress(options.line()) as shown, shown.step("ray"):
        pass
    (_, ready), (level, ray) = messages(capsys)
    assert (level, ready, ray[:5]) == ("info", "ready on 127.0.0.1:7000", "✓ ray")
    options.configure_logs("error", ClusterConfig(), audit=False)
    options.say("ready")
    assert (capsys.readouterr().err, options.line()) == ("ready\n", None)


def test_what_libraries_say_is_logged_too(capsys: pytest.CaptureFixture[str]) -> None:
    options.configure_logs("error", ClusterConfig(log_format="json"), audit=False)
    take_over()
    logging.getLogger("asyncio").error("Task exception was never retrieved")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)

    def fails() -> None:
        raise ValueError("broken")

    thread = threading.Thread(target=fails, name="reader")
    thread.start()
    thread.join()
    found = messages(capsys)
    assert found[0] == ("error", "Task exception was never retrieved")
    assert found[1][0] == "warning" and "DeprecationWarning: old" in found[1][1]
    assert found[2] == ("error", "reader has raised")


def test_what_grpc_says_of_peers_fills_no_log(capsys: pytest.CaptureFixture[str]) -> None:
    options.configure_logs("error", ClusterConfig(log_format="json"), audit=False)
    take_over()
    GRPC.error("Invalid encoding on %s", b"\xff\xfe")
    GRPC.error("ExecuteBatchError raised in core by servicer method [%s]", "/isthmus.v1.Worker/GetReport")
    GRPC.error("Unexpected [%s] raised by servicer method", "ValueError")
    assert [message for _, message in messages(capsys)] == ["Unexpected [ValueError] raised by servicer method"]

"""`isthmus up`: a local Ray cluster from its start to its end, with a worker killed in between."""

import json
import signal
import time

import psutil
from models import model_path
from processes import free_port, isthmus, run, wait_ready


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def engine_process(role: str, processes: list[psutil.Process], server: str) -> psutil.Process:
    """The process of the worker with that role: the one that listens on the worker's port."""
    workers = json.loads(run("status", "--json", "--server", server).stdout)["workers"]
    address = next(worker["address"] for worker in workers if role in worker["role"])
    port = int(address.rpartition(":")[2])
    for process in processes:
        try:
            if any(c.laddr.port == port and c.status == "LISTEN" for c in process.net_connections()):
                return process
        except psutil.Error:
            continue
    raise LookupError(f"no process of ours listens on {address}")


def test_up_serves_survives_a_kill_and_leaves_nothing_behind() -> None:
    model, server = model_path("tiny-llama"), f"127.0.0.1:{free_port()}"
    port = server.rpartition(":")[2]
    with isthmus("up", "--prefill", "1", "--decode", "1", "--model", model, "--port", port) as up:
        wait_ready(server, 2)
        ask = ("generate", "hello", "--server", server, "--temperature", "0", "--max-tokens", "8", "--ignore-eos")
        before = run(*ask)
        assert before.returncode == 0, before.stderr

        started = descendants(up.pid)
        engine_process("DECODE", started, server).kill()
        end = time.monotonic() + 120
        after = run(*ask)
        while after.returncode != 0 and time.monotonic() < end:
            time.sleep(0.5)
            after = run(*ask)
        assert (after.returncode, after.stdout) == (0, before.stdout), after.stderr

        started += descendants(up.pid)
        up.send_signal(signal.SIGINT)
        assert up.wait(60) == 0
        _, alive = psutil.wait_procs(started, timeout=10)
        assert not alive, f"left behind: {[process.name() for process in alive]}"


def test_a_mistake_in_the_settings_is_told_before_anything_starts(tmp_path) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_text("prefil: 2\n")
    begun = time.monotonic()
    answer = run("up", "--config", str(config))
    assert answer.returncode != 0
    assert b"unknown key 'prefil'" in answer.stderr.replace(b"\n", b" ")
    assert b"Traceback" not in answer.stderr
    assert time.monotonic() - begun < 20

"""A process in the foreground ends at a second signal, whatever hangs in it."""

import signal
import subprocess
import sys
import time

import pytest

from isthmus.cluster.launch.foreground import INTERRUPTED

HANGS = """
import asyncio, sys, threading
from isthmus.cluster.launch import foreground

foreground.AT_ONCE_S, foreground.GIVE_UP_S = 0.5, float(sys.argv[1])
released = threading.Event()

async def start():
    print("starts", flush=True)
    await asyncio.to_thread(released.wait)

async def stop(drain_s):
    print("stops", flush=True)

sys.exit(foreground.run_service(start, stop, 1.0))
"""


@pytest.mark.parametrize(("signals", "give_up_s"), [(2, 60.0), (1, 0.5)], ids=["a second signal", "while it starts"])
def test_a_thread_that_cannot_be_stopped_holds_up_no_end(signals: int, give_up_s: float) -> None:
    command = [sys.executable, "-c", HANGS, str(give_up_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "starts\n"
            for _ in range(signals):
                process.send_signal(signal.SIGTERM)
                time.sleep(0.3)
            assert process.wait(timeout=20) == INTERRUPTED
            assert process.stdout.read() == "stops\n"
        finally:
            process.kill()

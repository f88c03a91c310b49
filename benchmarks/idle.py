"""What one gateway process costs while its workers have nothing to do.

Run as a process it is the workers: so many that only report (half of each role), with the service and the heartbeat of
real ones, and in each report what a worker tells that has served requests: rates, and links to all others.
"""

import argparse
import asyncio
import signal
import subprocess
import sys
import time

import psutil
from support.dialling import to_gateway, transport_as
from support.processes import free_port, isthmus

from isthmus.cluster.text.served import load_served_model
from isthmus.kvtransfer.codecs.registry import DEFAULT_CODEC
from isthmus.kvtransfer.frame import PROTOCOL_VERSION
from isthmus.proto import worker_pb2
from isthmus.proto.rpc.server import Server
from isthmus.proto.worker_pb2 import (
    WORKER_HEALTH_READY,
    WORKER_ROLE_DECODE,
    WORKER_ROLE_PREFILL,
    ClusterStatus,
    GetStatusRequest,
    ModelReport,
    PageCounts,
    PrefillRate,
    StepRate,
    WorkerReport,
)
from isthmus.proto.worker_pb2_grpc import ClusterStub, add_WorkerServicer_to_server
from isthmus.worker.service import ReportServicer

MODEL = "smollm2-135m"  # whose tokenizer the gateway has
START_S, SETTLE_S = 60.0, 3.0


def idle_share(workers: int, seconds: float) -> float:
    """The share of a core that a gateway process takes with so many idle workers, all of its threads together."""
    stand_ins = subprocess.Popen([sys.executable, __file__, str(workers)], stdout=subprocess.PIPE, text=True)
    try:
        assert stand_ins.stdout is not None
        addresses = stand_ins.stdout.readline().strip()
        listen, admin = (f"127.0.0.1:{free_port()}" for _ in range(2))
        arguments = ("--workers", addresses, "--listen", listen, "--admin-listen", admin, "--model", MODEL)
        with isthmus("gateway", *arguments, "--no-preflight") as gateway:
            asyncio.run(_all_ready(admin, workers))
            time.sleep(SETTLE_S)
            before_s, begun_s = _cpu_s(gateway.pid), time.monotonic()
            time.sleep(seconds)
            used_s, took_s = _cpu_s(gateway.pid) - before_s, time.monotonic() - begun_s
            asyncio.run(_all_ready(admin, workers))
            return used_s / took_s
    finally:
        stand_ins.send_signal(signal.SIGTERM)
        stand_ins.wait(30)


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


async def _all_ready(admin: str, workers: int) -> None:
    """Returns once the gateway uses all workers."""
    end_s = time.monotonic() + START_S
    async with to_gateway(admin) as channel:
        while time.monotonic() < end_s:
            status: ClusterStatus = await ClusterStub(channel).GetStatus(GetStatusRequest(), wait_for_ready=True)
            if sum(worker.health == WORKER_HEALTH_READY for worker in status.workers) == workers:
                return
            await asyncio.sleep(0.2)
    raise RuntimeError(f"the gateway does not see {workers} ready workers")


def _report(number: int, model: ModelReport, addresses: list[str]) -> WorkerReport:
    prefill = number % 2 == 0
    report = WorkerReport(
        worker_id=f"{'prefill' if prefill else 'decode'}-{number // 2}",
        role=WORKER_ROLE_PREFILL if prefill else WORKER_ROLE_DECODE,
        health=WORKER_HEALTH_READY,
        instance=f"{number:032x}",
        protocol_version=PROTOCOL_VERSION,
        model=model,
        codecs={"raw": "r" * 16, DEFAULT_CODEC: "t" * 16},
        default_codec=DEFAULT_CODEC,
        page_tokens=64,
        pages=PageCounts(total=10_000, free=9_000, cached=1_000),
        prefill_rate=PrefillRate(ms=2, ms_per_token=0.2, ms_per_token_ktoken=0.004),
        uptime_ms=round(time.monotonic() * 1e3),
    )
    if not prefill:
        report.step_rate.CopyFrom(StepRate(ms=8, ms_per_sequence=0.1, ms_per_page=0.001))
        for address in addresses[::2]:
            report.link_bytes_per_ms[address] = 1.25e6
    return report


async def _serve(workers: int) -> None:
    known = load_served_model(MODEL)
    model = ModelReport(
        name=known.name,
        fingerprint=known.fingerprint,
        context_length=known.context_length,
        vocab_size=known.vocab_size,
    )
    addresses: list[str] = []
    servers: list[Server] = []
    transport = transport_as("prefill", "decode")
    for number in range(workers):
        reports = ReportServicer(lambda number=number: _report(number, model, addresses))
        add = {
            worker_pb2.DESCRIPTOR.services_by_name["Worker"]: lambda server, reports=reports: (
                add_WorkerServicer_to_server(reports, server)
            )
        }
        server = await transport.listen("127.0.0.1:0", add)
        await server.set_serving(True)
        servers.append(server)
        addresses.append(f"127.0.0.1:{server.port}")
    print(",".join(addresses), flush=True)
    ends = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ends.set)
    await ends.wait()
    for server in servers:
        await server.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workers", type=int)
    asyncio.run(_serve(parser.parse_args().workers))

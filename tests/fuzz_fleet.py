"""The clusters that `fuzz.py` calls: one that must stay as it is, and one whose workers may be drained and flipped."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import Descriptor, MethodDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from models import model_path

from isthmus.cluster.client.client import Client, build_request
from isthmus.cluster.frontend.gateway import Gateway
from isthmus.cluster.gateway_config import GatewayConfig
from isthmus.cluster.jobs.settings import JobsSettings
from isthmus.cluster.launch.role_host import RoleHost, settings_by_role
from isthmus.cluster.text.served import load_served_model
from isthmus.kvtransfer.frame import PROTOCOL_VERSION
from isthmus.proto import common_pb2, decode_pb2, generation_pb2, jobs_pb2, prefill_pb2, worker_pb2
from isthmus.proto.common_pb2 import PRIORITY_BATCH
from isthmus.proto.generation_pb2 import Chat, ChatMessage
from isthmus.proto.jobs_pb2 import ListJobsRequest
from isthmus.proto.jobs_pb2_grpc import JobsStub
from isthmus.proto.rpc.transport import Transport
from isthmus.proto.sampling import Sampling
from isthmus.proto.worker_pb2 import WORKER_HEALTH_READY, WORKER_ROLE_DECODE, WORKER_ROLE_PREFILL

MODEL = "tiny-llama"
CANARY = build_request(
    token_ids=[(7 * position) % 500 for position in range(100)],
    codec="raw",
    sampling={"temperature": 0, "max_tokens": 12, "ignore_eos": True},
)
# Of the gateway, of prefill workers, of decode workers; then of every server.
GATEWAY, PREFILL, DECODE = ("Generation", "Cluster", "Jobs"), ("Prefill", "Worker"), ("Decode", "Worker")
OURS = (common_pb2, decode_pb2, generation_pb2, jobs_pb2, prefill_pb2, worker_pb2)
ORDERS = ("Drain", "Flip", "DrainWorker", "FlipWorker", "Scale")  # to the second cluster only
# That a call may take before it is cancelled: streams that only the caller ends, answers, all others.
WATCH_S, ANSWER_S, CALL_S = 0.05, 3.0, 0.5


@dataclass(frozen=True)
class Method:
    """One RPC, and where it may be called."""

    path: str
    kind: str  # as grpc.aio.Channel calls it
    input: Descriptor
    output: Descriptor
    addresses: tuple[str, ...]
    limit_s: float  # that a call may take before it is cancelled


@dataclass
class Fleet:
    """Both clusters, while they run."""

    gateway: Gateway
    hosts: list[RoleHost]
    spare: Gateway  # of the second cluster
    spare_hosts: list[RoleHost]
    spare_addresses: tuple[str, ...] = ()  # of these, for good
    expected: list[int] = field(default_factory=list)  # the canary's tokens
    methods: list[Method] = field(default_factory=list)
    transport: Transport = field(default_factory=Transport)
    channels: dict[str, grpc.aio.Channel] = field(default_factory=dict)
    valid: Mapping[str, Sequence[Message]] = field(default_factory=dict)  # requests, by their type
    known: dict[str, list[str]] = field(default_factory=dict)  # values of string fields
    replaced: list[RoleHost] = field(default_factory=list)
    _replacing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def replace_lost(self) -> None:
        """Starts workers of the second cluster anew where they were drained for good."""
        async with self._replacing:
            for host in self.replaced:  # an order that it was still following may have built another worker
                await host.stop()
            for number, host in enumerate(self.spare_hosts):
                if host.drained.is_set():
                    await host.stop()
                    self.replaced.append(host)
                    listen = self.spare_addresses[number]
                    self.spare_hosts[number] = fresh = _host(host.role, f"spare-{number}", listen)
                    try:
                        await fresh.start()
                    except OSError:  # that other worker has the address: next time
                        fresh.drained.set()

    async def left_behind(self, tasks: int, within_s: float = 30) -> list[str]:
        """What is still held once nothing runs any more, after at most `within_s`."""
        await self._end_jobs()
        left: list[str] = []
        for _ in range(int(within_s / 0.1)):
            left = [*self._held(), *_extra_tasks(tasks)]
            if not left:
                break
            await asyncio.sleep(0.1)
        return left

    async def _end_jobs(self) -> None:
        stub: Any = JobsStub(self.channels[self.gateway.address])
        while jobs := (await stub.ListJobs(ListJobsRequest(states=[1, 2], page_size=1000))).jobs:
            for job in jobs:
                try:
                    await stub.CancelJob(jobs_pb2.CancelJobRequest(job_id=job.job_id))
                except grpc.aio.AioRpcError as error:  # it has ended meanwhile
                    if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                        raise

    def _held(self) -> list[str]:
        held = [f"the gateway counts {self.gateway.load.active} requests"] if self.gateway.load.active else []
        for gateway in (self.gateway, self.spare):
            channels, workers = gateway.transport.open_channels, len(gateway.fleet.statuses())
            if channels != workers:
                held.append(f"a gateway of {workers} workers has {channels} open channels")
        for host in self.hosts:
            report = host.server.report()
            pages = report.pages
            counts = (pages.in_use, report.waiting_requests, report.running_requests, report.host_buffer_bytes)
            if any(counts) or pages.free + pages.cached != pages.total or report.health != WORKER_HEALTH_READY:
                held.append(
                    f"{report.worker_id}: (pages, waiting, running, buffered) {counts}, {pages}, {report.reason}"
                )
        return held


def _extra_tasks(most: int) -> list[str]:
    running = asyncio.all_tasks()
    return [f"{len(running)} tasks, {most} at first: {sorted(map(str, running))}"] if len(running) > most else []


@asynccontextmanager
async def running_fleet(folder: Path) -> AsyncIterator[Fleet]:
    """Both clusters, ready, with what a fuzzer needs to know of them; jobs are kept in `folder`."""
    jobs = JobsSettings(max_running=4, max_running_batch=2, sweep_s=0.2)
    settings = (
        GatewayConfig(restart_wait_s=2, jobs_db=f"sqlite:///{folder / 'jobs.db'}", jobs=jobs),
        GatewayConfig(restart_wait_s=0.2),
    )
    async with AsyncExitStack() as stack:
        hosts = [_host("prefill", "prefill-0"), _host("decode", "decode-0")]
        spares = [_host(role, f"spare-{n}") for n, role in enumerate(("prefill", "prefill", "decode", "decode"))]
        gateways = [Gateway("127.0.0.1:0", load_served_model(model_path(MODEL)), (), config) for config in settings]
        fleet = Fleet(gateways[0], hosts, gateways[1], spares)
        for gateway, members in zip(gateways, (hosts, spares), strict=True):
            for host in members:
                await host.start()
            await gateway.start()
            stack.push_async_callback(gateway.stop)
            for host in members:
                gateway.fleet.add(host.address)
            async with asyncio.timeout(120):
                while any(status.health != WORKER_HEALTH_READY for status in gateway.fleet.statuses()):
                    await asyncio.sleep(0.02)
        stack.push_async_callback(_stop, fleet)
        stack.push_async_callback(fleet.transport.close)
        async with Client(gateways[0].address) as client:
            fleet.expected = (await client.answer(CANARY)).token_ids
        _describe(fleet)
        for address in {address for method in fleet.methods for address in method.addresses}:
            fleet.channels[address] = fleet.transport.dial(address)
        yield fleet


def _host(role: Any, name: str, listen: str = "127.0.0.1:0") -> RoleHost:
    settings = {
        "model": model_path(MODEL),
        "dtype": "fp32",
        "tls": "off",
        "name": name,
        "pool_tokens": 8192,
        "listen": listen,
    }
    return RoleHost(role, settings_by_role(role, settings))


async def _stop(fleet: Fleet) -> None:
    for host in (*fleet.hosts, *fleet.spare_hosts, *fleet.replaced):
        await host.stop()


def _describe(fleet: Fleet) -> None:
    prefill, decode = (host.address for host in fleet.hosts)
    spares = fleet.spare_addresses = tuple(host.address for host in fleet.spare_hosts)
    main = dict.fromkeys(GATEWAY, (fleet.gateway.address,)) | {"Cluster": (fleet.gateway.admin_address,)}
    main |= {"Prefill": (prefill,), "Decode": (decode,), "Worker": (prefill, decode)}
    orders = {"Cluster": (fleet.spare.admin_address,), "Worker": spares}
    for module in OURS:
        for name, service in module.DESCRIPTOR.services_by_name.items():
            for method in service.methods:
                addresses = orders[name] if method.name in ORDERS else main[name]
                fleet.methods.append(_method(method, addresses))
    for module in (health_pb2, reflection_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            ports = (fleet.gateway.address, fleet.gateway.admin_address, prefill, decode)
            fleet.methods += [_method(method, ports) for method in service.methods]
    fleet.valid, fleet.known = _valid(fleet, prefill), _known(fleet, prefill)


def _method(method: MethodDescriptor, addresses: tuple[str, ...]) -> Method:
    kinds = {(False, False): "unary_unary", (False, True): "unary_stream", (True, True): "stream_stream"}
    return Method(
        f"/{method.containing_service.full_name}/{method.name}",
        kinds[method.client_streaming, method.server_streaming],
        method.input_type,
        method.output_type,
        addresses,
        {"Watch": WATCH_S, "Generate": ANSWER_S, "Prefill": ANSWER_S}.get(method.name, CALL_S),
    )


def _known(fleet: Fleet, prefill: str) -> dict[str, list[str]]:
    report = fleet.hosts[0].server.report()
    return {
        "worker": [host.server.name for host in fleet.spare_hosts],
        "model": [report.model.name],
        "name": [report.model.name],
        "codec": sorted(report.codecs),
        "codec_hash": sorted(report.codecs.values()),
        "model_fingerprint": [report.model.fingerprint],
        "prefill_addresses": [prefill, "127.0.0.1:1"],
        "service": ["isthmus.v1.Worker", "isthmus.v1.Generation"],
        "file_containing_symbol": ["isthmus.v1.Worker", "isthmus.v1.Job"],
        "job_id": [],
        "page_token": [],
    }


def _valid(fleet: Fleet, prefill: str) -> dict[str, list[Message]]:
    """Requests that are answered as they are; what is not here has none but the empty one."""
    report, tokens = fleet.hosts[0].server.report(), list(range(3, 150))
    sampling = Sampling(temperature=0, max_tokens=4).to_pb()
    asked = [
        CANARY,
        build_request(prompt="hello", sampling={"max_tokens": 5, "seed": 1, "logprobs": 3, "stop": ["x", "yy"]}),
        build_request(prompt="a much longer text " * 20, sampling={"max_tokens": 3}, codec="tq-k4v4"),
        generation_pb2.GenerateRequest(chat=Chat(messages=[ChatMessage(role="user", content="hi")])),
    ]
    shared: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "request_id": "fuzz",
        "model_fingerprint": report.model.fingerprint,
        "prompt_token_ids": tokens,
        "codec": "raw",
        "sampling": sampling,
    }
    decode = decode_pb2.DecodeRequest(**shared, prefill_addresses=[prefill])
    resumed = decode_pb2.DecodeRequest(**shared, prefill_addresses=[prefill], emitted_token_ids=[5])
    moved = prefill_pb2.PrefillRequest(**shared, codec_hash=report.codecs["raw"], page_tokens=report.page_tokens)
    job = jobs_pb2.SubmitJobRequest(requests=asked[:1], tenant="t", labels={"a": "b"}, retention=Duration(seconds=60))
    batch = jobs_pb2.SubmitJobRequest(requests=asked[1:3], priority=PRIORITY_BATCH, idempotency_key="k")
    spare = fleet.spare_hosts[0].server.name
    messages: list[Message] = [
        *(*asked, decode, resumed, moved, job, batch),
        jobs_pb2.ListJobsRequest(tenant="t", states=[1, 2, 3], labels={"a": "b"}, page_size=2),
        worker_pb2.FlipWorkerRequest(worker=spare, role=WORKER_ROLE_DECODE, timeout_s=0.5),
        worker_pb2.FlipRequest(role=WORKER_ROLE_PREFILL, timeout_s=0.5),
        worker_pb2.DrainWorkerRequest(worker=spare, timeout_s=0.5),
        worker_pb2.ScaleRequest(prefill=1, decode=2, timeout_s=0.5),
        reflection_pb2.ServerReflectionRequest(list_services="*"),
    ]
    by_type: dict[str, list[Message]] = {}
    for message in messages:
        by_type.setdefault(message.DESCRIPTOR.full_name, []).append(message)
    return by_type

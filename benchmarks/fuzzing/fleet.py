"""Two clusters of real processes to be fuzzed: one that must stay as it is, and one whose workers take orders; and a
supervisor by itself."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import psutil
import yaml
from faults.cluster import ChaosCluster, Node, chaos_cluster, free_port
from google.protobuf.message import Message

from isthmus.cluster.launch.local_orders import runtime_folder
from isthmus.proto.jobs_pb2 import CancelJobRequest, ListJobsRequest
from isthmus.proto.jobs_pb2_grpc import JobsStub
from isthmus.proto.rpc.transport import Transport
from isthmus.proto.security.identity import ServerName
from isthmus.proto.worker_pb2 import WORKER_HEALTH_READY, GetStatusRequest, WorkerReport
from isthmus.proto.worker_pb2_grpc import ClusterStub

from .doors import Doors
from .methods import Method, known_values, methods_of, valid_requests
from .supervisor import SupervisorNode

# Small, so that what is kept on purpose is full soon and what grows on is a leak.
POOL_TOKENS, HOST_CACHE_GIB = 8192, 0.05
SOCKET = "socket:"  # before the name of a process, in place of an address: its Unix socket
SERVERS: dict[str, ServerName] = {"gateway": "gateway", "supervisor": "supervisor"}
JOBS = {"max_running": 4, "max_running_batch": 2, "sweep_s": 0.2}


@dataclass
class Fleet:
    """Both clusters and the supervisor, while they run."""

    main: ChaosCluster
    spare: ChaosCluster
    apart: ChaosCluster  # the supervisor
    runtime: Path  # folder of the workers' sockets
    probes: dict[str, Node]  # ports that answer health probes alone, by their address
    doors: Doors
    transport: Transport  # of somebody who has every role
    reports: dict[str, WorkerReport]  # of the main cluster's workers, at first
    methods: list[Method] = field(default_factory=list)
    valid: Mapping[str, Sequence[Message]] = field(default_factory=dict)  # requests, by their type
    known: dict[str, list[str]] = field(default_factory=dict)  # values of string fields
    _channels: dict[str, grpc.aio.Channel] = field(default_factory=dict)

    @property
    def clusters(self) -> tuple[ChaosCluster, ...]:
        """Those of all processes."""
        return self.main, self.spare, self.apart

    @property
    def nodes(self) -> list[Node]:
        """All processes."""
        return [node for cluster in self.clusters for node in cluster.nodes]

    def node_at(self, address: str) -> Node:
        """The process that listens there."""
        if address in self.probes:
            return self.probes[address]
        if address.startswith(SOCKET):
            return next(node for node in self.nodes if node.name == address.removeprefix(SOCKET))
        for cluster in (self.main, self.spare):
            if address == admin_of(cluster):
                return cluster.gateway
        return next(node for node in self.nodes if node.address == address)

    def server_at(self, address: str) -> ServerName:
        """Whom a channel to that address expects."""
        return SERVERS.get(self.node_at(address).role, "worker")

    def label(self, address: str) -> str:
        """A name for a port that is the same in the next run."""
        node, own = self.node_at(address), ("probe:" if address in self.probes else "")
        if node.role == "gateway" and not own and address != node.address:
            own = "admin:"
        return address if address.startswith(SOCKET) else f"{own}{node.name}"

    def address_of(self, label: str) -> str:
        """The port of that name."""
        return next(at for method in self.methods for at in method.addresses if self.label(at) == label)

    def is_public(self, address: str) -> bool:
        """Whether a port asks for no certificate."""
        return address in (self.main.gateway.address, self.spare.gateway.address)

    def is_plain(self, address: str) -> bool:
        """Whether nothing there is encrypted: ports for probes, and sockets of the own host."""
        return address in self.probes or address.startswith(SOCKET)

    def where(self, address: str) -> str:
        """The same, or the path of the socket that a process has now."""
        if not address.startswith(SOCKET):
            return address
        process = self.node_at(address).process
        found = sorted(self.runtime.glob(f"{process.pid}-*.sock")) if process is not None else []
        return f"unix:{found[0] if found else self.runtime / 'none'}"

    def channel(self, address: str) -> grpc.aio.Channel:
        """One for each address, of somebody who may call everything."""
        at = self.where(address)
        if at not in self._channels:
            if self.is_plain(address):
                self._channels[at] = grpc.aio.insecure_channel(at)
            else:
                self._channels[at] = self.transport.dial(at, self.server_at(address))
        return self._channels[at]

    async def close(self) -> None:
        """Ends its channels."""
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))

    def processes(self) -> Iterator[tuple[str, psutil.Process]]:
        """Those of the main cluster that live."""
        for node in self.main.nodes:
            if node.alive and node.process is not None:
                yield node.name, psutil.Process(node.process.pid)

    def rss_mb(self) -> dict[str, int]:
        """Resident memory of each process of the main cluster."""
        return {name: process.memory_info().rss >> 20 for name, process in self.processes()}

    def connections(self) -> dict[str, int]:
        """Open connections of each process of the main cluster."""
        return {
            name: sum(connection.status == psutil.CONN_ESTABLISHED for connection in process.net_connections("tcp"))
            for name, process in self.processes()
        }

    async def left_behind(self, within_s: float = 60) -> list[str]:
        """What the main cluster still holds once nothing is asked any more, after at most `within_s`."""
        end = time.monotonic() + within_s
        await self._end_jobs()
        while (left := await self._held()) and time.monotonic() < end:
            await asyncio.sleep(0.2)
        return left

    async def _end_jobs(self) -> None:
        stub: Any = JobsStub(self.channel(self.main.gateway.address))
        while jobs := (await stub.ListJobs(ListJobsRequest(states=[1, 2], page_size=1000), timeout=30)).jobs:
            for job in jobs:
                try:
                    await stub.CancelJob(CancelJobRequest(job_id=job.job_id), timeout=30)
                except grpc.aio.AioRpcError as error:  # it has ended meanwhile
                    if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                        raise

    async def _held(self) -> list[str]:
        stub: Any = ClusterStub(self.channel(admin_of(self.main)))
        active = (await stub.GetStatus(GetStatusRequest(), timeout=30)).active_requests
        held = [f"the gateway counts {active} requests"] if active else []
        for name, report in (await self.main.reports()).items():
            pages = report.pages
            counts = (pages.in_use, report.waiting_requests, report.running_requests, report.host_buffer_bytes)
            if any(counts) or pages.free + pages.cached != pages.total or report.health != WORKER_HEALTH_READY:
                held.append(f"{name}: (pages, waiting, running, buffered) {counts}, {pages}, {report.reason}")
        return held


def admin_of(cluster: ChaosCluster) -> str:
    """Where its gateway takes orders: at a port of its own, where it has one."""
    return getattr(cluster, "admin", cluster.gateway.address)


@asynccontextmanager
async def running_fleet(model: str, folder: Path) -> AsyncIterator[Fleet]:
    """Both clusters, ready, with what a fuzzer needs to know of them; logs and jobs are kept in `folder`."""
    probes = {section: f"127.0.0.1:{free_port()}" for section in ("gateway", "prefill_worker", "decode_worker")}
    _write_settings(folder, probes)
    supervisor = f"127.0.0.1:{free_port()}"
    own = SupervisorNode("supervisor", "supervisor", supervisor, (), folder / "main" / "supervisor.log")
    apart = ChaosCluster([own], "")

    def start(name: str, jobs: str) -> Any:
        config = ("--config", str(folder / name / "settings.yaml"))
        gateway_options = (*config, "--jobs-db", jobs)
        return chaos_cluster(
            model, folder / name, prefill=1, decode=1, worker_options=config, gateway_options=gateway_options
        )

    doors = Doors()
    transport = doors.transport()
    async with start("main", f"sqlite:///{folder / 'jobs.db'}") as main, start("spare", "none") as spare:
        for node in spare.nodes:
            node.name = f"spare-{node.name}"
        keeper = asyncio.create_task(apart.keep())
        fleet = None
        try:
            of_role = {f"{node.role}_worker": node for node in main.workers} | {"gateway": main.gateway}
            fleet = Fleet(
                main=main,
                spare=spare,
                apart=apart,
                runtime=runtime_folder(),
                probes={address: of_role[section] for section, address in probes.items()},
                doors=doors,
                transport=transport,
                reports=await main.reports(),
            )
            prefill, decode = (main.of(role)[0].address for role in ("prefill", "decode"))
            fleet.methods = methods_of(
                gateway=main.gateway.address,
                admin=admin_of(main),
                prefill=prefill,
                decode=decode,
                orders=admin_of(spare),
                spares=[node.address for node in spare.workers],
                sockets=[f"{SOCKET}{node.name}" for node in spare.workers],
                supervisor=supervisor,
                probes=list(fleet.probes),
            )
            report = fleet.reports[main.of("prefill")[0].name]
            spare_id = (await spare.reports())[spare.workers[0].name].worker_id
            fleet.valid = valid_requests(report, prefill, spare_id)
            fleet.known = known_values(report, prefill, spare_id)
            yield fleet
        finally:
            keeper.cancel()
            own.end()
            if fleet is not None:
                await fleet.close()
            await transport.close()


def _write_settings(folder: Path, probes: Mapping[str, str]) -> None:
    """A folder with settings for each cluster; `probes`: where the main one answers probes, by section."""
    of_gateway = {"main": {"restart_wait_s": 10, "jobs": JOBS}, "spare": {"restart_wait_s": 0.2}}
    for name, gateway in of_gateway.items():
        settings: dict[str, dict[str, Any]] = {
            "gateway": dict(gateway),
            "prefill_worker": {"pool_tokens": POOL_TOKENS, "host_cache_gib": HOST_CACHE_GIB},
            "decode_worker": {"pool_tokens": POOL_TOKENS},
        }
        for section, address in probes.items() if name == "main" else ():
            settings[section]["health_listen"] = address
        (folder / name).mkdir()
        (folder / name / "settings.yaml").write_text(yaml.safe_dump(settings))

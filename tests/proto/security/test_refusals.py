"""Connections that must not come about, and what is said of them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from certified import CLUSTER, believing, certificate, security, transport

from isthmus.proto import worker_pb2
from isthmus.proto.rpc.statuses import is_unreached, tls_problem
from isthmus.proto.rpc.transport import Transport
from isthmus.proto.security.certificates import KeyPair, make_ca
from isthmus.proto.security.credentials import Security
from isthmus.proto.security.identity import ServerName
from isthmus.proto.worker_pb2 import GetReportRequest, WorkerReport
from isthmus.proto.worker_pb2_grpc import WorkerStub, add_WorkerServicer_to_server
from isthmus.worker.service import ReportServicer

WORKER = worker_pb2.DESCRIPTOR.services_by_name["Worker"]
CA = make_ca(CLUSTER)


@asynccontextmanager
async def worker(of: Security | None, asked: list[str]) -> AsyncIterator[str]:
    """A worker's server, which notes that it was asked; its address."""

    def report() -> WorkerReport:
        asked.append("asked")
        return WorkerReport(worker_id="worker")

    reports = ReportServicer(report)
    server = await Transport(of).listen(
        "127.0.0.1:0", {WORKER: lambda server: add_WorkerServicer_to_server(reports, server)}
    )
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        await server.stop()


async def problem(caller: Transport, address: str, role: ServerName | None = "worker") -> str | None:
    """What is said of a connection that did not come about; "" where it did."""
    try:
        async with caller.dial(address, role) as channel:
            await WorkerStub(channel).GetReport(GetReportRequest(), timeout=10)
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert is_unreached(error)
        return tls_problem(error)
    return ""


async def test_there_is_no_way_down_to_plain_text() -> None:
    asked: list[str] = []
    async with worker(None, asked) as plain, worker(security(CA, "decode"), asked) as encrypted:
        assert "talks in plain text" in (await problem(transport(CA, "gateway"), plain) or "")
        assert await problem(Transport(), encrypted) != ""
        assert asked == []
        assert await problem(transport(CA, "gateway"), encrypted) == ""
    assert asked == ["asked"]


async def test_a_certificate_that_has_ended_is_believed_by_nobody() -> None:
    ended = certificate(CA, "decode", "gateway", days=1e-6)
    await asyncio.sleep(0.2)
    own = believing(CA.certificate, ended, "decode", "gateway")
    async with worker(own, []) as address:
        assert await problem(transport(CA, "gateway"), address) == "its certificate has expired"
    async with worker(security(CA, "decode"), []) as address:
        assert "does not accept the certificate" in (await problem(Transport(own), address) or "")
        assert await problem(transport(CA, "gateway"), address) == ""


async def test_a_server_is_who_it_is_expected_to_be() -> None:
    """A decode worker cannot pose as a prefill worker, nor one of another cluster as one of this."""
    other = "for somebody else"
    gateway = transport(CA, "gateway")
    async with worker(security(CA, "decode"), asked := []) as address:
        assert await problem(gateway, address, "decode") == ""
        for role in ("prefill", "gateway", "supervisor"):
            assert other in (await problem(gateway, address, role) or "")  # pyright: ignore[reportArgumentType]
        assert asked == ["asked"]
    async with worker(security(CA, "decode", "prefill"), []) as address:
        assert [await problem(gateway, address, role) for role in ("decode", "prefill", "worker")] == ["", "", ""]
    async with worker(security(CA, "decode", cluster="another"), []) as address:
        assert other in (await problem(gateway, address, "decode") or "")
    async with worker(security(CA, "gateway"), []) as address:
        assert other in (await problem(gateway, address, "worker") or "")


async def test_a_ca_that_is_not_trusted_signs_for_nobody() -> None:
    async with worker(security(make_ca(CLUSTER), "decode"), []) as address:
        assert "none of the CAs" in (await problem(transport(CA, "gateway"), address) or "")


async def test_public_clients_know_a_gateway_by_its_host() -> None:
    def server(hosts: list[str]) -> Security:
        return believing(CA.certificate, certificate(CA, "decode", "gateway", hosts=hosts), "decode")

    def client() -> Transport:
        return Transport(Security(security(CA, "gateway")._source, expects_host=True))

    async with worker(server(["127.0.0.1"]), []) as address:
        assert await problem(client(), address, "prefill") == ""  # whatever role is said
    async with worker(server(["10.0.0.5", "llm.example.com"]), []) as address:
        assert "for somebody else" in (await problem(client(), address, None) or "")


async def test_a_leaf_certificate_signs_for_nobody() -> None:
    """A worker's certificate and key make no CA, whoever it hands out what it signed."""
    leaf = certificate(CA, "decode")
    forged = forge(leaf)
    own = believing(CA.certificate, forged, "gateway")
    async with worker(security(CA, "decode"), asked := []) as address:
        assert await problem(Transport(own), address) != ""
        assert asked == []


def forge(leaf: KeyPair) -> KeyPair:
    """A gateway's certificate that a worker has signed with its own key, its chain beside it."""
    from isthmus.proto.security import certificates

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificates, "_is_ca", lambda certificate: True)
        made = certificate(leaf, "gateway")
    return KeyPair(made.certificate + leaf.certificate, made.key)

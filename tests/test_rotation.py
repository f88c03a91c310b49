"""Certificates and CA are replaced again and again while requests run: none fails, and what was trusted before is not
believed any more afterwards."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest
from certified import CLUSTER, Folder, believing, certificate
from models import model_path

from isthmus.cluster.client.client import Client, build_request
from isthmus.cluster.frontend.gateway import Gateway
from isthmus.cluster.gateway_config import GatewayConfig
from isthmus.cluster.text.served import load_served_model
from isthmus.decode.config import DecodeConfig
from isthmus.decode.worker import DecodeWorker
from isthmus.prefill.config import PrefillConfig
from isthmus.prefill.worker import PrefillWorker
from isthmus.proto.errors import InvalidRequest
from isthmus.proto.rpc.transport import Transport
from isthmus.proto.security import credentials
from isthmus.proto.security.certificates import make_ca
from isthmus.proto.security.credentials import Security
from isthmus.proto.security.settings import TlsFiles, security_of
from isthmus.proto.security.sources import Files
from isthmus.proto.worker_pb2 import GetReportRequest
from isthmus.proto.worker_pb2_grpc import WorkerStub
from isthmus.worker import service

MODEL = "tiny-llama"
ROTATE_S, RUN_S, AT_ONCE = 1.0, 15.0, 4


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "CHECK_S", 0.05)
    monkeypatch.setattr(service, "WATCH_S", 2.0)


@asynccontextmanager
async def cluster(folder: Folder) -> AsyncIterator[tuple[Gateway, list[PrefillWorker | DecodeWorker]]]:
    """A prefill worker, a decode worker that computes no prompt, and a gateway, each with files of its own."""
    path = model_path(MODEL)
    shared = {"model": path, "dtype": "fp32", "pool_tokens": 4096}
    workers: list[PrefillWorker | DecodeWorker] = [
        PrefillWorker(PrefillConfig(**shared, tls=TlsFiles(**folder.files("prefill")), name="prefill")),
        DecodeWorker(DecodeConfig(**shared, tls=TlsFiles(**folder.files("decode")), name="decode")),
    ]
    for worker in workers:
        await worker.start()
    gateway = Gateway(
        *("127.0.0.1:0", load_served_model(path), [worker.address for worker in workers]),
        GatewayConfig(local_prefill="never"),
        security=security_of(TlsFiles(**folder.files("gateway")), CLUSTER, "gateway"),
    )
    await gateway.start()
    try:
        async with asyncio.timeout(60):
            await gateway.ready.wait()
        yield gateway, workers
    finally:
        await gateway.stop()
        for worker in workers:
            await worker.stop()


async def rotate(folder: Folder) -> None:
    """A new CA follows the old one: first both are trusted, then all have certificates of the new one, then only that
    is trusted."""
    old, new = folder.ca, make_ca(CLUSTER)
    for step in (lambda: folder.trust(old, new), lambda: folder.issue_all(new), lambda: folder.trust(new)):
        step()
        await asyncio.sleep(ROTATE_S / 3)


async def test_no_request_fails_while_certificates_and_cas_are_replaced(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    ca_of_clients = folder.files("client")["ca"]
    first_ca = folder.ca
    async with cluster(folder) as (gateway, workers):
        security = Security(Files(Path(ca_of_clients)), expects_host=True)
        end_s, answers, rotations = time.monotonic() + RUN_S, list[list[int]](), 0
        request = build_request(
            token_ids=list(range(3, 200)), sampling={"temperature": 0, "max_tokens": 24, "ignore_eos": True}
        )

        async def ask() -> None:
            """One request after the other, each through a connection of its own."""
            while time.monotonic() < end_s:
                async with Client(gateway.address, Transport(security)) as client:
                    answers.append((await client.answer(request, timeout_s=30)).token_ids)

        async def keep_asking() -> None:
            """The same through one channel, which has to connect anew."""
            async with Client(gateway.address, Transport(security)) as client:
                while time.monotonic() < end_s:
                    answers.append((await client.answer(request, timeout_s=30)).token_ids)

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(ask())
                group.create_task(keep_asking())
            while time.monotonic() < end_s:
                await rotate(folder)
                rotations += 1
        assert rotations >= 10
        assert len(answers) > 2 * AT_ONCE
        assert {tuple(answer) for answer in answers} == {tuple(answers[0])}, "all the same, and whole"
        assert gateway.transport.security is not None and gateway.transport.security.version >= 2 * rotations
        assert sum(worker.server.report().counters["transfers_failed"] for worker in workers) == 0

        old = believing(first_ca.certificate + folder.ca.certificate, certificate(first_ca, "gateway"), "gateway")
        new = believing(folder.ca.certificate, certificate(folder.ca, "gateway"), "gateway")
        for worker in workers:
            async with Transport(old).dial(worker.address, "worker") as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await WorkerStub(channel).GetReport(GetReportRequest(), timeout=10)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            async with Transport(new).dial(worker.address, "worker") as channel:
                await WorkerStub(channel).GetReport(GetReportRequest(), timeout=10)
        await connections_are_given_up(gateway.transport)


async def connections_are_given_up(transport: Transport) -> None:
    """Each channel ends with one connection: the old ones are closed once their calls have ended."""
    async with asyncio.timeout(10):
        while any(channel._old for channel in transport._open):
            await asyncio.sleep(0.05)


async def test_files_that_do_not_go_together_change_nothing(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    files = folder.files("prefill")
    security = Security(Files(Path(files["ca"]), Path(files["cert"]), Path(files["key"])))
    before = security.current()
    other = certificate(folder.ca, "prefill")
    Path(files["key"]).write_bytes(other.key)  # of a certificate that is not there yet
    await asyncio.sleep(0.1)
    assert security.current() == before
    Path(files["cert"]).write_bytes(b"nothing")
    await asyncio.sleep(0.1)
    assert security.current() == before
    Path(files["cert"]).unlink()
    await asyncio.sleep(0.1)
    assert security.current() == before
    Path(files["cert"]).write_bytes(other.certificate)
    await asyncio.sleep(0.1)
    version, material = security.current()
    assert (version, material.pair) == (1, other)
    decode = certificate(folder.ca, "decode")
    Path(files["cert"]).write_bytes(decode.certificate)
    Path(files["key"]).write_bytes(decode.key)
    await asyncio.sleep(0.1)
    assert security.current() == (version, material), "a process does not become another one"


def test_a_certificate_is_for_its_role_and_cluster(tmp_path: Path) -> None:
    tls = TlsFiles(**Folder(tmp_path).files("prefill"))
    with pytest.raises(InvalidRequest, match="for prefill, not for decode"):
        security_of(tls, None, "decode")
    with pytest.raises(InvalidRequest, match="of cluster tested, the settings say cluster_id another"):
        security_of(tls, "another", "prefill")

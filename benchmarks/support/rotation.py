"""Processes of a cluster whose certificates and CA are replaced while requests run."""

import asyncio
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc.aio

from isthmus.cluster.client.client import Client, build_request
from isthmus.proto.rpc.transport import Transport
from isthmus.proto.security.certificates import make_ca
from isthmus.proto.security.credentials import Security
from isthmus.proto.security.sources import Files, Material, Memory
from isthmus.proto.worker_pb2 import GetReportRequest
from isthmus.proto.worker_pb2_grpc import WorkerStub

from .certificates import CLUSTER, CertificateFiles, certificate
from .processes import free_port, isthmus
from .report import say

START_S = 300.0
TOKENS = 32


async def rotate_under_load(model: str, seconds: float, every_s: float, at_once: int) -> dict[str, Any]:
    """Starts a prefill worker, a decode worker and a gateway; what became of the requests, and of the first CA."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        files = CertificateFiles(Path(folder))
        first, addresses = files.ca, [f"127.0.0.1:{free_port()}" for _ in range(3)]
        own = ("--model", model)
        for role, address in (("prefill", addresses[0]), ("decode", addresses[1])):
            arguments = ("worker", role, "--listen", address, *own, "--threads", "1")
            stack.enter_context(isthmus(*arguments, **_environment(files.files(role))))
        serving = ("gateway", "--listen", addresses[2], "--workers", ",".join(addresses[:2]), *own)
        stack.enter_context(isthmus(*serving, **_environment(files.files("gateway"))))
        security = Security(Files(Path(files.files("client")["ca"])), expects_host=True)
        await _ready(addresses[2], security)
        say("the cluster is ready")
        counts = await _load(addresses[2], security, files, seconds, every_s, at_once)
        trusts = first.certificate + files.ca.certificate
        refused = [await _refused(address, trusts, certificate(first, "gateway")) for address in addresses[:2]]
        believed = [await _refused(address, trusts, certificate(files.ca, "gateway")) for address in addresses[:2]]
    return {**counts, "first_ca_refused": all(refused), "last_ca_refused": any(believed)}


async def _load(
    address: str, security: Security, files: CertificateFiles, seconds: float, every_s: float, at_once: int
) -> dict[str, Any]:
    """Half of the requests go through connections of their own, half through one that each asker keeps."""
    end_s, answers, failures, rotations = time.monotonic() + seconds, list[tuple[int, ...]](), list[str](), 0
    requests = [
        build_request(token_ids=[n + 3] * 60, sampling={"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True})
        for n in range(at_once)
    ]

    async def ask(number: int, client: Client) -> None:
        try:
            tokens = tuple((await client.answer(requests[number], timeout_s=300)).token_ids)
        except grpc.aio.AioRpcError as error:
            failures.append(f"{error.code().name}: {error.details()}")
            return
        answers.append(tokens)
        if len(tokens) != TOKENS:
            failures.append(f"{len(tokens)} tokens")

    async def keep_asking(number: int) -> None:
        async with Client(address, Transport(security)) as kept:
            while time.monotonic() < end_s:
                if number % 2:
                    await ask(number, kept)
                    continue
                async with Client(address, Transport(security)) as fresh:
                    await ask(number, fresh)

    async with asyncio.TaskGroup() as group:
        for number in range(at_once):
            group.create_task(keep_asking(number))
        while time.monotonic() < end_s:
            old, new = files.ca, make_ca(CLUSTER)
            files.trust(old, new)
            await asyncio.sleep(every_s / 3)
            files.issue_all(new)
            await asyncio.sleep(every_s / 3)
            files.trust(new)
            await asyncio.sleep(every_s / 3)
            rotations += 1
            say(f"{rotations} CAs, {len(answers)} answers, {len(failures)} failures")
    return {
        "requests": len(answers) + len(failures),
        "failed": len(failures),
        "failures": failures[:10],
        "cas": rotations,
    }


async def _ready(address: str, security: Security) -> None:
    end_s = time.monotonic() + START_S
    request = build_request(token_ids=[3, 4, 5], sampling={"temperature": 0, "max_tokens": 2, "ignore_eos": True})
    while True:
        try:
            async with Client(address, Transport(security)) as client:
                await client.answer(request, timeout_s=60)
                return
        except grpc.aio.AioRpcError:
            if time.monotonic() > end_s:
                raise
            await asyncio.sleep(0.3)


async def _refused(address: str, trusts: bytes, pair: Any) -> bool:
    transport = Transport(Security(Memory(Material(trusts, pair))))
    try:
        async with transport.dial(address, "worker") as channel:
            await WorkerStub(channel).GetReport(GetReportRequest(), timeout=10)
    except grpc.aio.AioRpcError as error:
        return error.code() is grpc.StatusCode.UNAVAILABLE
    return False


def _environment(files: dict[str, str]) -> dict[str, str]:
    return {f"ISTHMUS_TLS__{name.upper()}": path for name, path in files.items()}

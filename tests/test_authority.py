"""Who gets how far at the ports of a real cluster, and what these say in plain text."""

import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from certified import believing, methods, outcome, transport
from grpc_health.v1 import health_pb2, health_pb2_grpc
from secured import secured_cluster
from support.certificates import CLUSTER, CertificateFiles

from isthmus.proto.decode_pb2 import DecodeRequest
from isthmus.proto.decode_pb2_grpc import DecodeStub
from isthmus.proto.rpc.transport import Transport
from isthmus.proto.security.certificates import make_ca

OURS = ("gateway", "supervisor", "prefill", "decode", "admin", "client")
STRANGERS = ("no certificate", "another CA", "another cluster")
KEEPERS = {"gateway", "supervisor"}
HEALTH = "grpc.health.v1.Health"
MAY: dict[str, dict[str, set[str]]] = {
    "prefill": {"isthmus.v1.Prefill": {"decode"}, "isthmus.v1.Worker": KEEPERS, HEALTH: set(OURS)},
    "decode": {"isthmus.v1.Decode": {"gateway"}, "isthmus.v1.Worker": KEEPERS, HEALTH: set(OURS)},
}
REFUSED = {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE}


async def test_the_ports_of_workers_are_for_those_of_the_table(tmp_path: Path) -> None:
    """Every RPC that a worker has, by everybody: whoever may call it gets past the door, to be told what is wrong with
    an empty request, and nobody else does."""
    folder = CertificateFiles(tmp_path)
    async with secured_cluster(folder) as (_, workers), AsyncExitStack() as stack:
        for worker in workers:
            report = worker.server.report()
            assert report.tls and 0 < report.certificate_expires_unix_s - time.time() <= 86_400
        callers = {role: transport(folder.ca, role) for role in OURS}
        both = folder.ca.certificate + (other := make_ca(CLUSTER)).certificate
        callers["another CA"] = transport(other, *OURS, trusts=both)
        callers["another cluster"] = transport(folder.ca, *OURS, cluster="another")
        callers["no certificate"] = Transport(believing(folder.ca.certificate, None))
        wrong = dict[str, str]()
        for worker in workers:
            channels = {who: each.dial(worker.address) for who, each in callers.items()}
            for each in callers.values():
                stack.push_async_callback(each.close)
            name = worker.server.name
            for method, streams, request in methods():
                service = method.split("/")[1]
                if service not in MAY[name]:
                    continue
                codes = await asyncio.gather(*(outcome(each, method, streams, request) for each in channels.values()))
                passed = {who for who, code in zip(channels, codes, strict=True) if code not in REFUSED}
                if passed != MAY[name][service]:
                    wrong[f"{method} of {name}"] = str(sorted(passed))
        assert wrong == {}


async def test_a_decode_worker_takes_its_pages_from_no_impostor(tmp_path: Path) -> None:
    """Pointed at a server that is no prefill worker by its certificate, it is none, whatever it would answer."""
    folder = CertificateFiles(tmp_path)
    async with secured_cluster(folder) as (_, workers):
        prefill, decode = workers
        report = decode.server.report()
        request = DecodeRequest(
            protocol_version=report.protocol_version,
            request_id="mine",
            model_fingerprint=report.model.fingerprint,
            codec="raw",
            prompt_token_ids=range(3, 40),
            prefill_addresses=[decode.address],
        )
        request.sampling.max_tokens = 2
        gateway = transport(folder.ca, "gateway")
        async with gateway.dial(decode.address, "decode") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in DecodeStub(channel).Generate(request, timeout=30):
                    pass
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "Hostname Verification" in (caught.value.details() or "")
            request.prefill_addresses[:] = [prefill.address]
            tokens = [token async for event in DecodeStub(channel).Generate(request) for token in event.token_ids]
        assert len(tokens) == 2


async def test_probes_in_plain_text_learn_of_health_and_nothing_else(tmp_path: Path) -> None:
    async with secured_cluster(CertificateFiles(tmp_path), health_listen="127.0.0.1:0") as (gateway, workers):
        assert gateway._health_server is not None
        addresses = [worker.server.bound_health for worker in workers]
        for address in [f"127.0.0.1:{gateway._health_server.port}", *addresses]:
            assert address is not None
            async with Transport().dial(address) as channel:
                health: Any = health_pb2_grpc.HealthStub(channel)
                answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=10)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
                for method, streams, request in methods():
                    if HEALTH not in method:
                        assert await outcome(channel, method, streams, request) is grpc.StatusCode.UNIMPLEMENTED
        await workers[0].drain(0)
        async with Transport().dial(addresses[0] or "") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING

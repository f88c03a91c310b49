"""Every RPC of every service, where it is served, and requests for them that are fine."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from google.protobuf.descriptor import Descriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from isthmus import proto
from isthmus.cluster.client.client import build_request
from isthmus.kvtransfer.frame import PROTOCOL_VERSION
from isthmus.proto import decode_pb2, generation_pb2, jobs_pb2, prefill_pb2, supervisor_pb2, worker_pb2
from isthmus.proto.common_pb2 import PRIORITY_BATCH
from isthmus.proto.generation_pb2 import Chat, ChatMessage
from isthmus.proto.sampling import Sampling
from isthmus.proto.worker_pb2 import WORKER_ROLE_DECODE, WORKER_ROLE_PREFILL, WorkerReport

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


def our_services() -> list[ServiceDescriptor]:
    """The services of all protocol files."""
    modules = [import_module(f"isthmus.proto.{found.name}") for found in iter_modules(proto.__path__)]
    files = [module.DESCRIPTOR for module in modules if module.__name__.endswith("_pb2")]
    return [service for file in files for service in file.services_by_name.values()]


def methods_of(
    *,
    gateway: str,
    admin: str,
    prefill: str,
    decode: str,
    supervisor: str,
    orders: str,
    spares: Sequence[str],
    sockets: Sequence[str],
    probes: Sequence[str],
) -> list[Method]:
    """All methods, at the addresses of their servers; `sockets` take orders too, `probes` tell their health alone."""
    served = {
        **dict.fromkeys(("Generation", "Jobs"), (gateway,)),
        "Cluster": (admin, supervisor),
        "Prefill": (prefill,),
        "Decode": (decode,),
        "Supervisor": (supervisor,),
        "Worker": (prefill, decode, *sockets),
    }
    ordered = {"Cluster": (orders,), "Worker": (*spares, *sockets)}
    methods = []
    for service in our_services():
        for method in service.methods:
            if addresses := (ordered if method.name in ORDERS else served).get(service.name):
                methods.append(_method(method, addresses))
    everywhere = (gateway, prefill, decode, supervisor)
    for module, addresses in ((health_pb2, (*everywhere, *probes)), (reflection_pb2, everywhere)):
        for service in module.DESCRIPTOR.services_by_name.values():
            methods += [_method(method, addresses) for method in service.methods]
    return methods


def _method(method: MethodDescriptor, addresses: tuple[str, ...]) -> Method:
    kinds = {(False, False): "unary_unary", (False, True): "unary_stream", (True, True): "stream_stream"}
    return Method(
        f"/{method.containing_service.full_name}/{method.name}",
        kinds[method.client_streaming, method.server_streaming],
        method.input_type,
        method.output_type,
        addresses,
        {"Watch": WATCH_S, "WatchWorkers": WATCH_S, "Generate": ANSWER_S, "Prefill": ANSWER_S}.get(method.name, CALL_S),
    )


def known_values(report: WorkerReport, prefill: str, spare: str) -> dict[str, list[str]]:
    """Values of string fields, by name, that mean something to the servers."""
    return {
        "worker": [spare],
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


def valid_requests(report: WorkerReport, prefill: str, spare: str) -> dict[str, list[Message]]:
    """Requests that are answered as they are, by type; what is not here has none but the empty one."""
    tokens = list(range(3, 150))
    sampling = Sampling(temperature=0, max_tokens=4).to_pb()
    asked = [
        build_request(token_ids=tokens, codec="raw", sampling={"temperature": 0, "max_tokens": 12, "ignore_eos": True}),
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
    job = jobs_pb2.SubmitJobRequest(requests=asked[:1], tenant="t", labels={"a": "b"}, retention=Duration(seconds=60))
    messages: list[Message] = [
        *asked,
        decode_pb2.DecodeRequest(**shared, prefill_addresses=[prefill]),
        decode_pb2.DecodeRequest(**shared, prefill_addresses=[prefill], emitted_token_ids=[5]),
        prefill_pb2.PrefillRequest(**shared, codec_hash=report.codecs["raw"], page_tokens=report.page_tokens),
        job,
        jobs_pb2.SubmitJobRequest(requests=asked[1:3], priority=PRIORITY_BATCH, idempotency_key="k"),
        jobs_pb2.ListJobsRequest(tenant="t", states=[1, 2, 3], labels={"a": "b"}, page_size=2),
        worker_pb2.FlipWorkerRequest(worker=spare, role=WORKER_ROLE_DECODE, timeout_s=0.5),
        worker_pb2.FlipRequest(role=WORKER_ROLE_PREFILL, timeout_s=0.5),
        worker_pb2.DrainWorkerRequest(worker=spare, timeout_s=0.5),
        worker_pb2.ScaleRequest(prefill=1, decode=2, timeout_s=0.5),
        reflection_pb2.ServerReflectionRequest(list_services="*"),
        supervisor_pb2.WatchWorkersRequest(gateway="127.0.0.1:1", waiting_for=[WORKER_ROLE_DECODE]),
    ]
    by_type: dict[str, list[Message]] = {}
    for message in messages:
        by_type.setdefault(message.DESCRIPTOR.full_name, []).append(message)
    return by_type

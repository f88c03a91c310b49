"""What a decode or prefill worker refuses before it does anything."""

from typing import Any

import grpc
import grpc.aio
import pytest
from harness import worker_pair
from models import model_path

from isthmus.kvtransfer.frame import PROTOCOL_VERSION
from isthmus.proto.errors import InvalidRequest
from isthmus.proto.prefill_pb2 import PrefillRequest
from isthmus.proto.prefill_pb2_grpc import PrefillStub
from isthmus.proto.rpc.transport import Transport
from isthmus.proto.sampling import Sampling
from isthmus.proto.worker_pb2 import DrainRequest, FlipRequest
from isthmus.worker.service import OrderServicer

SAMPLING = Sampling(temperature=0, max_tokens=3, ignore_eos=True)


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call.read()
    return raised.value.code(), raised.value.details() or ""


async def test_requests_out_of_bounds_are_refused_by_name() -> None:
    async with worker_pair(model_path("tiny-llama")) as pair:
        for fields, told in (
            ({"prefill_addresses": ["unix:/tmp/x"]}, "prefill_addresses: 'unix:/tmp/x' is not host:port"),
            ({"prefill_addresses": ["127.0.0.1:1", "xds:///x"]}, "prefill_addresses: 'xds:///x' is not host:port"),
            ({"prefill_addresses": ["127.0.0.1:1"] * 65}, "65 prefill_addresses; allowed: at most 64"),
            ({"tenant": "a\0b"}, "tenant has characters that cannot be printed"),
            ({"request_id": "i" * 257}, "request_id of 257 characters; allowed: at most 256"),
            ({"emitted_token_ids": [5] * 1024}, "1024 emitted tokens are more than the model's context"),
        ):
            request = pair.request([1, 2, 3], SAMPLING)
            for name, value in fields.items():
                request.ClearField(name)  # pyright: ignore[reportArgumentType]
                if isinstance(value, list):
                    getattr(request, name).extend(value)
                else:
                    setattr(request, name, value)
            code, details = await refusal(pair.call(request))
            assert (code, details.startswith(told)) == (grpc.StatusCode.INVALID_ARGUMENT, True), details
        assert len(pair.decode._peers) == 0, "no channel was made"
        async with Transport().dial(pair.prefill.address) as channel:
            report = pair.prefill.server.report()
            request = PrefillRequest(
                protocol_version=PROTOCOL_VERSION,
                model_fingerprint=report.model.fingerprint,
                codec="raw",
                codec_hash=report.codecs["raw"],
                page_tokens=report.page_tokens,
                prompt_token_ids=[1],
                tenant="\0",
            )
            code, details = await refusal(PrefillStub(channel).Prefill(request))
            assert (code, details.startswith("tenant has")) == (grpc.StatusCode.INVALID_ARGUMENT, True)


@pytest.mark.parametrize("timeout_s", [float("nan"), float("inf"), -1.0, 1e10])
async def test_orders_with_times_that_cannot_be_drain_nothing(timeout_s: float) -> None:
    async with worker_pair(model_path("tiny-llama")) as pair:
        reports = pair.decode.server._reports
        assert isinstance(reports, OrderServicer)
        pair.decode.server.orders = object()  # pyright: ignore[reportAttributeAccessIssue]
        context: Any = None
        drain, flip = DrainRequest(timeout_s=timeout_s), FlipRequest(timeout_s=timeout_s)
        for order in (reports.Drain(drain, context), reports.Flip(flip, context)):
            with pytest.raises(InvalidRequest, match=r"timeout_s is .*; allowed: 0 to 86400 seconds"):
                await order
        assert (await pair.generate([1, 2, 3], SAMPLING)).token_ids

"""The trace context of a request reaches the prefill worker."""

import pytest
from harness import worker_pair
from models import model_path

from isthmus.prefill.worker import PrefillWorker
from isthmus.proto.sampling import Sampling

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_the_trace_context_goes_on_to_the_prefill_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    serve = PrefillWorker.Prefill

    async def watched(self, request, context):
        seen.update(context.invocation_metadata())
        await serve(self, request, context)

    monkeypatch.setattr(PrefillWorker, "Prefill", watched)
    async with worker_pair(model_path("tiny-llama")) as pair:
        request = pair.request([1, 2, 3], Sampling(temperature=0, max_tokens=2, ignore_eos=True))
        call = pair.stub.Generate(request, metadata=(("traceparent", TRACE), ("other", "x")))
        assert [event async for event in call]
    assert seen["traceparent"] == TRACE
    assert "other" not in seen

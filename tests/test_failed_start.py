"""A worker that cannot start says why, and can be stopped all the same."""

import pytest

from isthmus.decode.config import DecodeConfig
from isthmus.decode.worker import DecodeWorker
from isthmus.prefill.config import PrefillConfig
from isthmus.prefill.worker import PrefillWorker
from isthmus.proto.errors import IsthmusError


def prefill_worker(model: str) -> PrefillWorker:
    return PrefillWorker(PrefillConfig(model=model, tls="off"))


def decode_worker(model: str) -> DecodeWorker:
    return DecodeWorker(DecodeConfig(model=model, tls="off"))


@pytest.mark.parametrize("make", [prefill_worker, decode_worker])
async def test_a_model_that_is_not_there(make) -> None:
    worker = make("./no-such-model")
    with pytest.raises(IsthmusError, match="no-such-model"):
        await worker.start()
    await worker.stop()

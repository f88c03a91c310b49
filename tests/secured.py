"""A cluster with certificates in files, in this process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from models import model_path
from support.certificates import CLUSTER, CertificateFiles

from isthmus.cluster.frontend.gateway import Gateway
from isthmus.cluster.gateway_config import GatewayConfig
from isthmus.cluster.text.served import load_served_model
from isthmus.decode.config import DecodeConfig
from isthmus.decode.worker import DecodeWorker
from isthmus.prefill.config import PrefillConfig
from isthmus.prefill.worker import PrefillWorker
from isthmus.proto.security.settings import TlsFiles, security_of

MODEL = "tiny-llama"


@asynccontextmanager
async def secured_cluster(
    folder: CertificateFiles, **own: Any
) -> AsyncIterator[tuple[Gateway, list[PrefillWorker | DecodeWorker]]]:
    """A prefill worker, a decode worker that computes no prompt, and a gateway, each with files of its own.

    `own`: settings of both workers and the gateway besides.
    """
    path = model_path(MODEL)
    shared = {"model": path, "dtype": "fp32", "pool_tokens": 4096, **own}
    workers: list[PrefillWorker | DecodeWorker] = [
        PrefillWorker(PrefillConfig(**shared, tls=TlsFiles(**folder.files("prefill")), name="prefill")),
        DecodeWorker(DecodeConfig(**shared, tls=TlsFiles(**folder.files("decode")), name="decode")),
    ]
    for worker in workers:
        await worker.start()
    gateway = Gateway(
        *("127.0.0.1:0", load_served_model(path), [worker.address for worker in workers]),
        GatewayConfig(local_prefill="never", **own),
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

"""Which pool a decode worker gets, how large, and whether its steps are recorded."""

import logging
from collections.abc import Sequence

from ..kernels.shapes import LayerShape
from ..kvtransfer.codecs.registry import PageCodec, build_codec
from ..kvtransfer.codecs.tq import TqCodec
from ..model.model import Model
from ..proto.errors import InvalidRequest
from .budget import KvBudget, kv_budget
from .config import DecodeConfig
from .pool.base import KvStore
from .pool.dense import DenseStore
from .pool.packed import PackedStore
from .stepping.graphs import recorder
from .stepping.padded_steps import PaddedSteps

log = logging.getLogger(__name__)


def keeps_packed(config: DecodeConfig, device: str) -> bool:
    """Whether pages stay packed: by default on a GPU with a codec whose pages attention can read.

    InvalidRequest where that is asked for with any other codec.
    """
    readable = config.default_codec.startswith("tq-")
    if config.pool == "packed" and not readable:
        raise InvalidRequest(f"the packed pool cannot hold codec {config.default_codec!r}; allowed: the tq- codecs")
    return config.pool == "packed" or (config.pool == "auto" and device == "cuda" and readable)


def budget_of(
    config: DecodeConfig, layers: Sequence[LayerShape], itemsize: int, context_length: int, device: str
) -> KvBudget:
    """How a worker with these settings divides its memory for KV; see `kv_budget`."""
    page_bytes = None
    if keeps_packed(config, device):
        codec = build_codec(config.default_codec, layers, config.page_tokens)
        page_bytes = sum(codec.page_bytes(layer) for layer in range(len(layers)))
    budget = kv_budget(config, layers, itemsize, context_length, packed_page_bytes=page_bytes)
    if budget.max_batch < config.max_batch:
        log.warning(
            "raw pages of max_batch %d would take more than half of pool_gib: %d requests run at once",
            *(config.max_batch, budget.max_batch),
        )
    return budget


def make_store(config: DecodeConfig, model: Model, codec: PageCodec, budget: KvBudget, *, packed: bool) -> KvStore:
    """An empty pool of the size that the budget says."""
    cached = int(config.prefix_cache * budget.pages)
    if not packed:
        return DenseStore(model, budget.pages, config.page_tokens, cached_pages=cached)
    assert isinstance(codec, TqCodec)
    return PackedStore(model, codec, budget.pages, config.page_tokens, budget.max_batch, cached_pages=cached)


def record_steps(config: DecodeConfig, model: Model, store: KvStore, max_batch: int) -> PaddedSteps | None:
    """Decode steps of that model and pool as CUDA graphs; None where there are none: they run as they are then."""
    record = recorder(model.device)
    if record is None or config.cuda_graphs == "never" or not isinstance(store, PackedStore):
        return None
    steps = PaddedSteps(model, store, most_tokens=max_batch)
    try:
        steps.record(record)
    except RuntimeError as error:  # some mixtures of experts ask the GPU on the way
        log.warning("decode steps run without CUDA graphs, more slowly: %s", error)
        return None
    return steps

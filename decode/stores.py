"""Which pool a decode worker gets, how large, and whether its steps are recorded."""

import logging

from ..kvtransfer.codec_tq import TqCodec
from ..kvtransfer.codecs import PageCodec
from ..kvtransfer.pool import pages_in
from ..model.model import Model
from ..proto.errors import InvalidRequest
from .config import DecodeConfig
from .dense_store import DenseStore
from .graphs import recorder
from .packed_store import PackedStore
from .padded_steps import PaddedSteps
from .store import KvStore

log = logging.getLogger(__name__)


def keeps_packed(config: DecodeConfig, device: str) -> bool:
    """Whether pages stay packed: by default on a GPU with a codec whose pages attention can read.

    InvalidRequest where that is asked for with any other codec.
    """
    readable = config.default_codec.startswith("tq-")
    if config.pool == "packed" and not readable:
        raise InvalidRequest(f"the packed pool cannot hold codec {config.default_codec!r}; allowed: the tq- codecs")
    return config.pool == "packed" or (config.pool == "auto" and device == "cuda" and readable)


def make_store(config: DecodeConfig, model: Model, codec: PageCodec, *, packed: bool) -> KvStore:
    """An empty pool of `pool_tokens`, or of as many pages as `pool_gib` holds."""
    if not packed:
        pages = pages_in(model.layers, config.page_tokens, model.dtype, gib=config.pool_gib, tokens=config.pool_tokens)
        return DenseStore(model, pages, config.page_tokens, cached_pages=int(config.prefix_cache * pages))
    assert isinstance(codec, TqCodec)
    page_bytes = sum(codec.page_bytes(layer) for layer in range(len(model.layers)))
    if config.pool_tokens is not None:
        pages = max(1, config.pool_tokens // config.page_tokens)
    else:
        pages = max(1, int(config.pool_gib * (1 << 30)) // page_bytes)
    cached = int(config.prefix_cache * pages)
    return PackedStore(model, codec, pages, config.page_tokens, config.max_batch, cached_pages=cached)


def record_steps(config: DecodeConfig, model: Model, store: KvStore) -> PaddedSteps | None:
    """Decode steps of that model and pool as CUDA graphs; None where there are none: they run as they are then."""
    record = recorder(model.device)
    if record is None or config.cuda_graphs == "never" or not isinstance(store, PackedStore):
        return None
    steps = PaddedSteps(model, store, most_tokens=config.max_batch)
    try:
        steps.record(record)
    except RuntimeError as error:  # some mixtures of experts ask the GPU on the way
        log.warning("decode steps run without CUDA graphs, more slowly: %s", error)
        return None
    return steps

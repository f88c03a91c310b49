"""Which pool a decode worker gets, and how large."""

from ..kvtransfer.codec_tq import TqCodec
from ..kvtransfer.codecs import PageCodec
from ..kvtransfer.pool import pages_in
from ..model.model import Model
from ..proto.errors import InvalidRequest
from .config import DecodeConfig
from .dense_store import DenseStore
from .packed_store import PackedStore
from .store import KvStore


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

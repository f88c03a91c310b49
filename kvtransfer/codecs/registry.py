"""Codecs: what a page of keys and values looks like in memory, on the wire and on disk.

A codec is made for one model and one page size. Raw pages (the first, the newest, a partial one) never pass
through it. Legend of shape suffixes: P pages, T tokens = pages * page_tokens, H KV heads, D head dimension,
B bytes of a packed page.

PyTorch is imported when a codec is built: a gateway checks names without it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from ...kernels.shapes import LayerShape
from ...proto.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DEFAULT_CODEC = "tq-k4v4"

_PACKED_BITS = ((4, 4), (4, 3), (4, 2), (3, 3), (3, 2), (2, 2))
TQ_BITS = {f"tq-k{key}v{value}": (key, value) for key, value in _PACKED_BITS}


def codec_names() -> tuple[str, ...]:
    """Every codec."""
    return ("raw", "fp8", *TQ_BITS)


class PageCodec(Protocol):
    """Keys and values of full pages <-> packed pages."""

    @property
    def name(self) -> str:
        """Its name in the registry."""
        ...

    @property
    def params_hash(self) -> str:
        """Hex digest of everything that decides the bytes; two sides that differ in it must not be paired."""
        ...

    @property
    def packs(self) -> bool:
        """False where every page stays raw: `encode` and `decode` are then never called."""
        ...

    def page_bytes(self, layer: int) -> int:
        """Bytes of one packed page of this layer (all KV heads, keys and values), a multiple of 16."""
        ...

    def encode(self, layer: int, k_THD: "Tensor", v_THD: "Tensor") -> "Tensor":
        """uint8 [P, B] of full pages of any float dtype. InvalidRequest where a value is NaN or infinite."""
        ...

    def decode(self, layer: int, packed_PB: "Tensor", dtype: "torch.dtype") -> "tuple[Tensor, Tensor]":
        """Keys and values [T, H, D] of packed pages. Corrupt where the bytes are not pages of this layer."""
        ...


class RawCodec:
    """Every page stays as it was computed."""

    name = "raw"
    params_hash = "raw-1"
    packs = False

    def page_bytes(self, layer: int) -> int:
        raise AssertionError("raw pages are not packed")

    def encode(self, layer: int, k_THD: "Tensor", v_THD: "Tensor") -> "Tensor":
        raise AssertionError("raw pages are not packed")

    def decode(self, layer: int, packed_PB: "Tensor", dtype: "torch.dtype") -> "tuple[Tensor, Tensor]":
        raise AssertionError("raw pages are not packed")


def build_codec(
    name: str, layers: Sequence[LayerShape], page_tokens: int, balance: "Sequence[Tensor] | None" = None
) -> PageCodec:
    """The codec of that name for these layers.

    `balance`: for each layer float [KV heads, head dimension], positive, as `calibration/balance.py` makes it;
    None: all ones. Raises NotFound for an unknown name, InvalidRequest where the codec cannot hold the
    layers or the page size.
    """
    from .fp8 import Fp8Codec
    from .tq import TqCodec

    if name not in codec_names():
        raise NotFound(f"no codec {name!r}; there are {', '.join(codec_names())}")
    if name == "raw":
        return RawCodec()
    if page_tokens < 8 or page_tokens % 8:
        raise InvalidRequest(f"page size {page_tokens}: codec {name!r} needs a multiple of 8 tokens")
    if name == "fp8":
        return Fp8Codec(layers, page_tokens)
    return TqCodec(name, layers, page_tokens, balance)

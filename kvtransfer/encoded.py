"""Encoded pages: what is sent, what host memory keeps, and what the store writes are the same bytes.

An encoded page holds its tokens of all layers, one layer after the other:

    layer 0 | layer 1 | ...      a packed layer: one page of the codec (`PageCodec.page_bytes`)
                                 a raw layer: [KV heads, 2 (keys, values), tokens, D] in bf16 or f32

Each layer is exactly the section of a frame, so that sending a page again copies nothing but its bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..kernels.shapes import LayerShape
from .codecs.registry import PageCodec
from .frame import BF16, F32, PACKED, RAW_BYTES, SectionHeader


@dataclass(frozen=True)
class PageKey:
    """What an encoded page is: the address of its content (`hashing.py`) and how it is written down.

    A page may be wanted raw in one prompt, where it is the newest, and packed in a longer one.
    """

    hash: bytes
    encoding: str


@dataclass(frozen=True, eq=False)
class EncodedPage:
    """A page of all layers. Its bytes are written once, layer by layer, and never change afterwards."""

    key: PageKey | None  # None: of a page that is not full, which has no address
    encoding: str
    tokens: int
    bounds: tuple[int, ...]  # of the layers in `data`: layer i is [bounds[i], bounds[i + 1])
    data: memoryview

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def layer(self, layer: int) -> memoryview:
        """The bytes of one layer."""
        return self.data[self.bounds[layer] : self.bounds[layer + 1]]


@dataclass(frozen=True)
class EncodedSection:
    """A section of one layer, ready for a frame: its bytes are those of `parts`, in order."""

    header: SectionHeader
    parts: tuple[memoryview, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class PageFormat:
    """How pages of one model, one codec and one page size are laid out, and what tells them from all others."""

    model_fingerprint: str
    codec: PageCodec
    layers: Sequence[LayerShape]
    page_tokens: int
    dtype: torch.dtype  # of the computation

    @property
    def raw_encoding(self) -> str:
        """Of pages that are not packed: bf16, or what was computed where the codec packs nothing."""
        return exact_encoding(self.dtype) if not self.codec.packs else BF16

    def key(self, page_hash: bytes, *, packed: bool) -> PageKey:
        """The key of a full page."""
        return PageKey(page_hash, PACKED if packed else self.raw_encoding)

    def sizes(self, encoding: str, tokens: int) -> list[int]:
        """Bytes of each layer."""
        if encoding == PACKED:
            return [self.codec.page_bytes(layer) for layer in range(len(self.layers))]
        return [raw_bytes(layer, tokens, encoding) for layer in self.layers]

    def blank(self, key: PageKey | None, tokens: int, *, packed: bool) -> EncodedPage:
        """A page whose bytes are still to be written."""
        encoding = PACKED if packed else self.raw_encoding
        return self.page(key, encoding, tokens, memoryview(bytearray(sum(self.sizes(encoding, tokens)))))

    def page(self, key: PageKey | None, encoding: str, tokens: int, data: memoryview) -> EncodedPage:
        """A page around bytes of the right length."""
        bounds = (0, *accumulate(self.sizes(encoding, tokens)))
        assert len(data) == bounds[-1], f"{len(data)} bytes for a page of {bounds[-1]}"
        return EncodedPage(key, encoding, tokens, bounds, data)

    def decode(self, layer: int, pages: Sequence[EncodedPage], device: torch.device) -> tuple[Tensor, Tensor]:
        """Keys and values [tokens of all pages, KV heads, D] of one layer of pages in one encoding, in order.

        Packed pages are unpacked on `device`; raw ones stay in host memory.
        """
        if pages[0].encoding == PACKED:
            joined = bytearray().join(page.layer(layer) for page in pages)
            packed_PB = torch.frombuffer(joined, dtype=torch.uint8).view(len(pages), -1)
            return self.codec.decode(layer, packed_PB.to(device), self.dtype)
        parts = [decode_raw(page.layer(layer), self.layers[layer], page.encoding) for page in pages]
        keys, values = zip(*parts, strict=True)
        return torch.cat(keys), torch.cat(values)


def exact_encoding(dtype: torch.dtype) -> str:
    """The encoding of raw pages that loses nothing: fp32 holds fp16 too."""
    return BF16 if dtype == torch.bfloat16 else F32


def raw_bytes(layer: LayerShape, tokens: int, encoding: str) -> int:
    """Size of keys and values of that many tokens of one layer."""
    return 2 * tokens * layer.kv_heads * layer.head_dim * RAW_BYTES[encoding]


def encode_raw(keys_THD: Tensor, values_THD: Tensor, encoding: str) -> Tensor:
    """[KV heads, 2, tokens, D] in bf16 or f32."""
    dtype = {BF16: torch.bfloat16, F32: torch.float32}[encoding]
    return torch.stack((keys_THD, values_THD)).permute(2, 0, 1, 3).to(dtype).contiguous()


def decode_raw(data: memoryview, layer: LayerShape, encoding: str) -> tuple[Tensor, Tensor]:
    """Keys and values [tokens, KV heads, D] of a raw section."""
    dtype = {BF16: torch.bfloat16, F32: torch.float32}[encoding]
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype)
    keys, values = flat.view(layer.kv_heads, 2, -1, layer.head_dim).permute(1, 2, 0, 3)
    return keys, values

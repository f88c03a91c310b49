"""The sending side of one transfer: from KV as computed to frames, layer by layer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.shapes import LayerShape
from ..proto.prefill_pb2 import KvCommit, KvFrame
from .codec_checks import check_finite
from .codecs import PageCodec
from .frame import BF16, F32, MAX_FRAME_BYTES, PACKED, RAW_BYTES, Binding, Digest, FrameWriter, SectionHeader
from .page import Section, sections


class KvSender:
    """Encodes what is computed of one prompt and cuts it into frames. Used by the engine thread alone.

    Tokens leave in page-aligned steps: `advance` says which sections of the next tokens are due, `encode` turns one
    of them, of one layer, into frames, `flush` empties the writer.
    """

    def __init__(
        self,
        binding: Binding,
        codec: PageCodec,
        layers: Sequence[LayerShape],
        page_tokens: int,
        prompt_tokens: int,
        held_tokens: int,
    ) -> None:
        self._codec, self._layers = codec, layers
        self._page_tokens, self._prompt_tokens = page_tokens, prompt_tokens
        self._writer = FrameWriter(binding)
        self._sent = held_tokens
        self.bf16_bytes = 0
        token_bytes = max(raw_bytes(layer, 1, F32) for layer in layers)
        pages = max(1, MAX_FRAME_BYTES // (token_bytes * page_tokens))
        self._section_tokens = pages * page_tokens

    @property
    def digest(self) -> Digest:
        """Counts of what was made so far."""
        return self._writer.digest

    def advance(self, computed: int) -> list[Section]:
        """The sections that are due once `computed` tokens exist: whole pages, and the rest at the prompt's end."""
        last = computed == self._prompt_tokens
        end = computed if last else computed - computed % self._page_tokens
        if end <= self._sent:
            return []
        due = sections(
            *(self._sent, end, self._prompt_tokens, self._page_tokens),
            packs=self._codec.packs,
            max_tokens=self._section_tokens,
        )
        self._sent = end
        return due

    def encode(self, layer: int, section: Section, keys_THD: Tensor, values_THD: Tensor) -> list[KvFrame]:
        """Encodes a section of one layer, [tokens, KV heads, D] each; returns the frames that are full.

        InvalidRequest, naming layer and head, where a value is NaN or infinite.
        """
        if section.packed:
            encoding, data = PACKED, self._codec.encode(layer, keys_THD, values_THD)
        else:
            check_finite(layer, keys_THD, values_THD)
            encoding, data = _encode_raw(keys_THD, values_THD, exact=not self._codec.packs)
        self.bf16_bytes += raw_bytes(self._layers[layer], section.tokens, BF16)
        view = data.cpu().contiguous().view(torch.uint8).numpy().data.cast("B")
        heads = self._layers[layer].kv_heads
        header = SectionHeader(layer, 0, heads, section.start, section.tokens, encoding, len(view))
        return self._writer.add(header, view)

    def flush(self) -> list[KvFrame]:
        """What the writer still holds."""
        return self._writer.flush()

    def commit(self) -> KvCommit:
        """The closing message, with no statistics yet."""
        digest = self._writer.digest
        return KvCommit(frames=digest.frames, payload_bytes=digest.payload_bytes, digest=digest.digest())


def raw_bytes(layer: LayerShape, tokens: int, encoding: str) -> int:
    """Size of keys and values of that many tokens of one layer."""
    return 2 * tokens * layer.kv_heads * layer.head_dim * RAW_BYTES[encoding]


def _encode_raw(keys_THD: Tensor, values_THD: Tensor, *, exact: bool) -> tuple[str, Tensor]:
    """[KV heads, 2, tokens, D]: in the dtype of the computation where `exact`, else in bf16."""
    both_H2TD = torch.stack((keys_THD, values_THD)).permute(2, 0, 1, 3)
    if exact and keys_THD.dtype == torch.float32:
        return F32, both_H2TD.contiguous()
    return BF16, both_H2TD.to(torch.bfloat16).contiguous()


def decode_raw(data: memoryview, layer: LayerShape, encoding: str) -> tuple[Tensor, Tensor]:
    """Keys and values [tokens, KV heads, D] of a raw section."""
    dtype = {BF16: torch.bfloat16, F32: torch.float32}[encoding]
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype)
    keys, values = flat.view(layer.kv_heads, 2, -1, layer.head_dim).permute(1, 2, 0, 3)
    return keys, values

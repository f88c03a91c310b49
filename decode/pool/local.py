"""A prompt that the decode worker computes itself, with what a transfer would have left in the pool.

A prefill worker computes a prompt on the KV as it comes out of the model and sends its middle pages packed. To end with
the same numbers, KV as computed lies beside the pool until the prompt is done; pages go into the pool, in the form
that they have there, as they fill.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...kernels.attention.dense import Span, ragged_attention
from ...kernels.shapes import LayerShape
from ...kvtransfer.codecs.checks import check_finite
from ...kvtransfer.codecs.registry import PageCodec
from ...kvtransfer.page import Section, packed_range, sections
from ...proto.errors import IsthmusError

WriteSection = Callable[[int, Section, Tensor, Tensor], None]
"""(layer, section, keys [tokens, KV heads, D], values): stores a section of the prompt in the pool."""


def needs_raw(codec: PageCodec, dtype: torch.dtype, start: int, prompt_tokens: int, page_tokens: int) -> bool:
    """Whether the pool changes numbers of the tokens [start, prompt_tokens): by packing, or by rounding to bf16.

    Where it does not, the prompt is computed in the pool itself.
    """
    packed_end = packed_range(prompt_tokens, page_tokens, codec.packs)[1]
    return codec.packs and (dtype != torch.bfloat16 or start < packed_end)


class LocalPrompt:
    """KV of one prompt as computed, for all layers, and the way of its pages into the pool."""

    def __init__(
        self,
        layers: Sequence[LayerShape],
        codec: PageCodec,
        prompt_tokens: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._layers, self._codec = layers, codec
        self._prompt_tokens, self._page_tokens = prompt_tokens, page_tokens
        shapes = [(prompt_tokens, layer.kv_heads, layer.head_dim) for layer in layers]
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        self.failure: IsthmusError | None = None  # its KV cannot be packed (a NaN, say)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def fill(self, layer: int, k_THD: Tensor, v_THD: Tensor) -> None:
        """Takes the prompt's first tokens from elsewhere."""
        self.keys[layer][: len(k_THD)], self.values[layer][: len(v_THD)] = k_THD, v_THD

    def attend(
        self, layer: int, start: int, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, scale: float, write: WriteSection
    ) -> Tensor:
        """Attention of the tokens [start, start + T), whose keys and values it keeps; full pages go to `write`.

        `start` lies on a page boundary, and so does the end except at the prompt's end.
        """
        end = start + len(q_THD)
        keys, values = self.keys[layer], self.values[layer]
        keys[start:end], values[start:end] = k_THD, v_THD
        span = Span(0, len(q_THD), start, ((0, end),))
        out = ragged_attention(q_THD, keys, values, [span], scale, self._layers[layer].window)
        try:
            for section in self._due(start, end):
                k, v = keys[section.start : section.end], values[section.start : section.end]
                if not section.packed:  # raw pages of such codecs travel as bf16
                    check_finite(layer, k, v)
                    k, v = k.to(torch.bfloat16), v.to(torch.bfloat16)
                write(layer, section, k, v)
        except IsthmusError as error:
            self.failure = error
        return out

    def _due(self, start: int, end: int) -> list[Section]:
        if self.failure:
            return []
        return sections(
            *(start, end, self._prompt_tokens, self._page_tokens), packs=self._codec.packs, max_tokens=end - start
        )

"""`fp8`: e4m3 numbers with one scale for each page, KV head, and kind (keys, values).

Per head: keys [page tokens, D] e4m3 | values | scale of keys, fp32 | scale of values, fp32 | 8 zero bytes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.shapes import LayerShape
from .checks import check_finite, check_packed, check_pages

_LARGEST = 448.0  # of e4m3
_TINY = torch.finfo(torch.float32).tiny
_TRAILER = 16


class Fp8Codec:
    """8 bits a value; see `PageCodec` for the methods."""

    name = "fp8"
    packs = True

    def __init__(self, layers: Sequence[LayerShape], page_tokens: int) -> None:
        self._layers = tuple(layers)
        self._page_tokens = page_tokens
        self.params_hash = f"fp8-1-{page_tokens}"

    def page_bytes(self, layer: int) -> int:
        shape = self._layers[layer]
        return shape.kv_heads * (2 * self._page_tokens * shape.head_dim + _TRAILER)

    def encode(self, layer: int, k_THD: Tensor, v_THD: Tensor) -> Tensor:
        pages = check_pages(self._layers[layer], self._page_tokens, k_THD, v_THD)
        check_finite(layer, k_THD, v_THD)
        shape = self._layers[layer]
        sections, scales = [], []
        for x_THD in (k_THD, v_THD):
            x = x_THD.float().view(pages, self._page_tokens, *x_THD.shape[1:]).transpose(1, 2)
            scale = (x.abs().amax((2, 3)) / _LARGEST).clamp_min(_TINY)
            sections.append((x / scale[..., None, None]).to(torch.float8_e4m3fn).view(torch.uint8).flatten(2))
            scales.append(scale[..., None].view(torch.uint8))
        padding = torch.zeros(pages, shape.kv_heads, 8, dtype=torch.uint8, device=k_THD.device)
        return torch.cat([*sections, *scales, padding], 2).flatten(1)

    def decode(self, layer: int, packed_PB: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        check_packed(packed_PB, self.page_bytes(layer))
        shape, page = self._layers[layer], self._page_tokens
        size = page * shape.head_dim
        heads = packed_PB.view(packed_PB.shape[0], shape.kv_heads, -1)
        scales = heads[:, :, 2 * size : 2 * size + 8].contiguous().view(torch.float32)
        limit = torch.finfo(dtype).max
        out = []
        for i in range(2):
            x = heads[:, :, i * size : (i + 1) * size].reshape(-1, shape.kv_heads, page, shape.head_dim)
            y = x.view(torch.float8_e4m3fn).float() * scales[:, :, i, None, None]
            out.append(y.clamp(-limit, limit).to(dtype).transpose(1, 2).flatten(0, 1).contiguous())
        return out[0], out[1]

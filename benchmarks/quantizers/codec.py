"""The published quantizers as page codecs: what the `tq-` family is measured against. Layout: `README.md` beside this.

Per head: keys | values, each as its quantizer lays it out, each padded to 16 bytes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from isthmus.kernels.pages.rotation import head_dims
from isthmus.kernels.shapes import LayerShape
from isthmus.kvtransfer.codecs.checks import check_finite, check_packed, check_pages
from isthmus.proto.errors import InvalidRequest

from .polar import Polar
from .turboquant import Mse, Outliers, PageQuantizer, Prod

PUBLISHED = (
    *(f"turboquant-mse-{bits}" for bits in (4, 3, 2)),
    *(f"turboquant-prod-{bits}" for bits in (4, 3, 2)),
    *("turboquant-3.5", "turboquant-2.5", "polarquant-4", "polarquant-3"),
)
_QUANTIZERS: dict[str, Callable[[int, int, int], PageQuantizer]] = {
    "turboquant-mse": Mse,
    "turboquant-prod": Prod,
    "polarquant": Polar,
}
_ALIGNMENT = 16
_CHUNK_PAGES = 64  # pages times heads at once: float64 needs room


def _quantizer(name: str, dim: int, page_tokens: int) -> PageQuantizer:
    if name in ("turboquant-2.5", "turboquant-3.5"):
        return Outliers(dim, page_tokens, int(name[-3]))
    family, _, bits = name.rpartition("-")
    return _QUANTIZERS[family](dim, page_tokens, int(bits))


class PublishedCodec:
    """One of PUBLISHED: a quantizer for keys and values alike; see `PageCodec` for the methods."""

    packs = True

    def __init__(self, name: str, layers: Sequence[LayerShape], page_tokens: int) -> None:
        for shape in layers:
            if shape.head_dim % 16 or shape.head_dim not in head_dims():
                allowed = ", ".join(str(d) for d in head_dims() if d % 16 == 0)
                raise InvalidRequest(f"codec {name!r}: head dimension {shape.head_dim}; allowed: {allowed}")
        self.name = name
        self._layers, self._page_tokens = tuple(layers), page_tokens
        self.params_hash = f"{name}-1-{page_tokens}"
        self._quantizers = {s.head_dim: _quantizer(name, s.head_dim, page_tokens) for s in layers}

    def _section(self, layer: int) -> int:
        size = self._quantizers[self._layers[layer].head_dim].page_bytes()
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    def page_bytes(self, layer: int) -> int:
        return self._layers[layer].kv_heads * 2 * self._section(layer)

    def encode(self, layer: int, k_THD: Tensor, v_THD: Tensor) -> Tensor:
        pages = check_pages(self._layers[layer], self._page_tokens, k_THD, v_THD)
        check_finite(layer, k_THD, v_THD)
        shape = self._layers[layer]
        quantizer = self._quantizers[shape.head_dim]
        out = torch.zeros(pages * shape.kv_heads, 2, self._section(layer), dtype=torch.uint8)
        for i, x_THD in enumerate((k_THD, v_THD)):
            x = x_THD.cpu().view(pages, self._page_tokens, shape.kv_heads, shape.head_dim).transpose(1, 2).flatten(0, 1)
            for start in range(0, len(x), _CHUNK_PAGES):
                part = quantizer.encode(x[start : start + _CHUNK_PAGES].double())
                out[start : start + _CHUNK_PAGES, i, : part.shape[1]] = part
        return out.view(pages, -1).to(k_THD.device)

    def decode(self, layer: int, packed_PB: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        check_packed(packed_PB, self.page_bytes(layer))
        shape = self._layers[layer]
        quantizer = self._quantizers[shape.head_dim]
        packed = packed_PB.cpu().view(-1, 2, self._section(layer))[:, :, : quantizer.page_bytes()]
        limit = torch.finfo(dtype).max
        out = []
        for i in range(2):
            x = torch.cat([quantizer.decode(part[:, i]) for part in packed.split(_CHUNK_PAGES)])
            x = x.clamp(-limit, limit).to(dtype).view(-1, shape.kv_heads, self._page_tokens, shape.head_dim)
            out.append(x.transpose(1, 2).flatten(0, 1).contiguous().to(packed_PB.device))
        return out[0], out[1]

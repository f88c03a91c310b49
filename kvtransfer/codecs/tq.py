"""The `tq-kXvY` family: TurboQuant's MSE form with page means of keys, a calibrated balance and norm-preserving scales.

X bits for a number of a key, Y bits for one of a value. Bytes and arithmetic: `docs/codec.md`,
`kernels/pages/layout.py`, `kernels/pages/reference.py`.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.attention.triton_path import has_triton
from ...kernels.pages.layout import PageLayout
from ...kernels.pages.pack_cpu import pack_cpu
from ...kernels.pages.reference import NotFinite, pack_reference, unpack_reference
from ...kernels.pages.rotation import SEED_KEYS, SEED_VALUES, Rotations, build_rotations, head_dims
from ...kernels.pages.unpack_cpu import packs_compiled, unpack_cpu
from ...kernels.shapes import LayerShape
from ...proto.errors import Corrupt, InvalidRequest
from .checks import check_finite, check_packed, check_pages
from .registry import TQ_BITS

LAYOUT_VERSION = 1


class TqCodec:
    """One member of the family; see `PageCodec` for the methods."""

    packs = True

    def __init__(
        self,
        name: str,
        layers: Sequence[LayerShape],
        page_tokens: int,
        balance: Sequence[Tensor] | None = None,
    ) -> None:
        key_bits, value_bits = TQ_BITS[name]
        for shape in layers:
            if shape.head_dim not in head_dims():
                allowed = ", ".join(map(str, head_dims()))
                raise InvalidRequest(
                    f"codec {name!r} has no rotation for head dimension {shape.head_dim}; allowed: {allowed}"
                )
        self.name = name
        self._shapes = tuple(layers)
        self._page_tokens = page_tokens
        self._balance = _checked_balance(self._shapes, balance)
        self._layouts = [
            PageLayout(head_dim=s.head_dim, page_tokens=page_tokens, key_bits=key_bits, value_bits=value_bits)
            for s in self._shapes
        ]
        self._rotations: dict[tuple[int, torch.device], Rotations] = {}
        self.params_hash = self._hash()

    def _hash(self) -> str:
        digest = hashlib.sha256(f"{self.name} {LAYOUT_VERSION} {self._page_tokens} {SEED_KEYS} {SEED_VALUES}".encode())
        for shape, balance_HD in zip(self._shapes, self._balance, strict=True):
            digest.update(f" {shape.kv_heads} {shape.head_dim} ".encode())
            digest.update(balance_HD.numpy().astype("<f4").tobytes())
        return digest.hexdigest()[:16]

    def layout(self, layer: int) -> PageLayout:
        """Offsets within one KV head of a packed page of this layer."""
        return self._layouts[layer]

    def rotations(self, layer: int, device: torch.device) -> Rotations:
        """The layer's rotations, built at first use on each device."""
        cached = self._rotations.get((layer, device))
        if cached is None:
            cached = build_rotations(self._balance[layer], device)
            self._rotations[layer, device] = cached
        return cached

    def page_bytes(self, layer: int) -> int:
        return self._shapes[layer].kv_heads * self._layouts[layer].head_bytes

    def encode(self, layer: int, k_THD: Tensor, v_THD: Tensor) -> Tensor:
        pages = check_pages(self._shapes[layer], self._page_tokens, k_THD, v_THD)
        rotations, layout = self.rotations(layer, k_THD.device), self._layouts[layer]
        if has_triton(k_THD.device):
            from ...kernels.pages.pack_triton import pack

            check_finite(layer, k_THD, v_THD)
            packed_PB = torch.zeros(pages, self.page_bytes(layer), dtype=torch.uint8, device=k_THD.device)
            places_P = torch.arange(pages, device=k_THD.device)
            starts_P = places_P * self._page_tokens
            pack(k_THD.contiguous(), v_THD.contiguous(), starts_P, rotations, layout, packed_PB, places_P)
            return packed_PB
        compiled = k_THD.device.type == "cpu" and packs_compiled(k_THD.dtype)
        try:
            return (pack_cpu if compiled else pack_reference)(k_THD, v_THD, rotations, layout)
        except NotFinite:
            check_finite(layer, k_THD, v_THD)  # raises, and says where
            raise

    def decode(self, layer: int, packed_PB: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        check_packed(packed_PB, self.page_bytes(layer))
        rotations, layout = self.rotations(layer, packed_PB.device), self._layouts[layer]
        if has_triton(packed_PB.device):
            from ...kernels.pages.unpack_triton import unpack

            return unpack(packed_PB.contiguous(), rotations, layout, dtype)
        compiled = packed_PB.device.type == "cpu" and packs_compiled(dtype)
        return (unpack_cpu if compiled else unpack_reference)(packed_PB, rotations, layout, dtype)


def _checked_balance(shapes: Sequence[LayerShape], balance: Sequence[Tensor] | None) -> list[Tensor]:
    if balance is None:
        return [torch.ones(s.kv_heads, s.head_dim) for s in shapes]
    if [tuple(b.shape) for b in balance] != [(s.kv_heads, s.head_dim) for s in shapes]:
        raise Corrupt("the balance was made for layers of other shapes")
    for layer, one in enumerate(balance):
        if not bool((one.isfinite() & (one > 0)).all()):
            raise Corrupt(f"the balance of layer {layer} has entries that are not positive and finite")
    return [b.float().cpu().contiguous() for b in balance]

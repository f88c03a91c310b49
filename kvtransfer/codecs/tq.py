"""The `tq-kXvY` family: TurboQuant's MSE form with page means of keys, a calibrated balance and
norm-preserving scales.

X bits a key value, Y bits a value's value. Bytes and arithmetic: `docs/codec.md`, `kernels/pages/pack.py`,
`kernels/pages/layout.py`.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.pages.layout import PageLayout
from ...kernels.pages.pack import NotFinite, Rotations, pack_reference
from ...kernels.pages.pack_cpu import pack_cpu
from ...kernels.pages.unpack import unpack_reference
from ...kernels.pages.unpack_cpu import packs_compiled, unpack_cpu
from ...kernels.rotation import hadamard, head_dims, signs
from ...kernels.shapes import LayerShape
from ...proto.errors import Corrupt, InvalidRequest
from .checks import check_finite, check_packed, check_pages
from .names import TQ_BITS

LAYOUT_VERSION = 1
SEED_KEYS, SEED_VALUES = 1, 2


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

    def gains(self, layer: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """What `kernels/pages/pack_triton.py` wants instead of rotations: signs / balance [H, D] and signs [D],
        float32."""
        dim = self._shapes[layer].head_dim
        keys = signs(SEED_KEYS, dim).float() / self._balance[layer]
        return keys.contiguous().to(device), signs(SEED_VALUES, dim).float().to(device)

    def page_bytes(self, layer: int) -> int:
        return self._shapes[layer].kv_heads * self._layouts[layer].head_bytes

    def encode(self, layer: int, k_THD: Tensor, v_THD: Tensor) -> Tensor:
        check_pages(self._shapes[layer], self._page_tokens, k_THD, v_THD)
        try:
            compiled = k_THD.device.type == "cpu" and packs_compiled(k_THD.dtype)
            pack = pack_cpu if compiled else pack_reference
            return pack(k_THD, v_THD, self.rotations(layer, k_THD.device), self._layouts[layer])
        except NotFinite:
            check_finite(layer, k_THD, v_THD)  # raises, and says where
            raise

    def decode(self, layer: int, packed_PB: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        check_packed(packed_PB, self.page_bytes(layer))
        compiled = packed_PB.device.type == "cpu" and packs_compiled(dtype)
        unpack = unpack_cpu if compiled else unpack_reference
        return unpack(packed_PB, self.rotations(layer, packed_PB.device), self._layouts[layer], dtype)


def build_rotations(balance_HD: Tensor, device: torch.device) -> Rotations:
    """The inverses and the diagonals of W_k = H diag(signs / balance) / sqrt(d) of each head and
    W_v = H diag(signs) / sqrt(d)."""
    dim = balance_HD.shape[1]
    orthonormal = hadamard(dim).double() / dim**0.5
    key_signs, value_signs = signs(SEED_KEYS, dim).double(), signs(SEED_VALUES, dim).double()
    balance = balance_HD.double()
    parts = (
        orthonormal.T * (key_signs * balance)[:, :, None],
        orthonormal.T * value_signs[:, None],
        key_signs * balance / dim**0.5,
        value_signs / dim**0.5,
        key_signs / balance,
        value_signs,
    )
    return Rotations(*(part.float().contiguous().to(device) for part in parts))


def _checked_balance(shapes: Sequence[LayerShape], balance: Sequence[Tensor] | None) -> list[Tensor]:
    if balance is None:
        return [torch.ones(s.kv_heads, s.head_dim) for s in shapes]
    if [tuple(b.shape) for b in balance] != [(s.kv_heads, s.head_dim) for s in shapes]:
        raise Corrupt("the balance was made for layers of other shapes")
    for layer, one in enumerate(balance):
        if not bool((one.isfinite() & (one > 0)).all()):
            raise Corrupt(f"the balance of layer {layer} has entries that are not positive and finite")
    return [b.float().cpu().contiguous() for b in balance]

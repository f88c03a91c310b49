"""Checks at the borders of the codecs: shapes, sizes, and numbers that are none."""

import torch
from torch import Tensor

from ...kernels.shapes import LayerShape
from ...proto.errors import Corrupt, InvalidRequest


def check_pages(shape: LayerShape, page_tokens: int, k_THD: Tensor, v_THD: Tensor) -> int:
    """How many pages these are; ValueError where the shapes are not those of the layer (a bug of the
    caller)."""
    expected = (k_THD.shape[0], shape.kv_heads, shape.head_dim)
    if tuple(k_THD.shape) != expected or tuple(v_THD.shape) != expected:
        raise ValueError(f"keys {tuple(k_THD.shape)}, values {tuple(v_THD.shape)}; wanted {expected}")
    if k_THD.shape[0] % page_tokens:
        raise ValueError(f"{k_THD.shape[0]} tokens are not whole pages of {page_tokens}")
    return k_THD.shape[0] // page_tokens


def check_finite(layer: int, k_THD: Tensor, v_THD: Tensor) -> None:
    """Raise InvalidRequest, naming layer, head and kind, where a value is NaN or infinite."""
    for kind, x_THD in (("keys", k_THD), ("values", v_THD)):
        # The sum of squares would overflow and min/max would cost twice: an infinity norm passes NaN and
        # infinity on.
        if not x_THD.numel() or bool(torch.linalg.vector_norm(x_THD, ord=torch.inf).isfinite()):
            continue
        bad_TH = ~x_THD.isfinite().all(-1)
        token, head = (int(i) for i in bad_TH.nonzero()[0])
        raise InvalidRequest(
            f"layer {layer}, KV head {head}: the {kind} of token {token} of these pages are not finite; "
            "pages hold finite numbers only"
        )


def check_packed(packed_PB: Tensor, page_bytes: int) -> None:
    """Corrupt where the bytes cannot be packed pages of this size."""
    if packed_PB.dtype != torch.uint8 or packed_PB.dim() != 2 or packed_PB.shape[1] != page_bytes:
        raise Corrupt(
            f"packed pages are {packed_PB.dtype} {tuple(packed_PB.shape)}; wanted uint8 [pages, {page_bytes}]"
        )

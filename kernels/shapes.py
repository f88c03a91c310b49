"""Shapes that the model, the KV pages and the kernels share."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """The KV of one attention layer."""

    kv_heads: int
    head_dim: int
    window: int | None = None  # a token sees itself and the window - 1 tokens before it; None: all before it

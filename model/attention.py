"""The bridge from a transformers model to whoever owns the KV cache.

A transformers model looks its attention function up by name. The one registered here hands query, key and value of
each layer to the `Attend` callback of the forward that runs in this thread. Threads do not see each other's callback,
so that several models of one process can run at once.

While serving no mask is made: a name that is not in transformers' `AttentionMaskInterface` gets None for each mask,
without the look for packed sequences (a device synchronisation per mask) that a registered name costs. What a layer's
tokens see is found out once, at load (`load/probe.py`), and belongs to its `LayerShape`.

Letters of tensor shapes: T tokens of the ragged batch, H heads, D head dimension.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..proto.errors import InvalidRequest
from .lean_imports import AttentionInterface

NAME = "isthmus"

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""(layer, q_THD [T, query heads, D], k_THD [T, kv heads, D], v_THD, scale) -> out_THD [T, query heads, D].

Keys come after RoPE. The callback makes the keys and values part of the KV cache before it attends, so that a token
sees itself; the scale is that of q · k."""

# What a layer may pass that does not change its attention, or that the caller of forward knows already.
_HARMLESS = frozenset(
    {
        *("cache_position", "is_causal", "layer_idx", "output_attentions", "output_hidden_states"),
        *("output_router_logits", "position_embeddings", "position_ids", "return_dict", "sliding_window"),
        "use_cache",
    }
)


SeeMask = Callable[[int, torch.Tensor | None], None]
"""(layer, the mask that transformers made for it)"""


class _Current(threading.local):
    attend: Attend | None = None
    see_mask: SeeMask | None = None


_current = _Current()


@contextmanager
def attending(attend: Attend, see_mask: SeeMask | None = None) -> Iterator[None]:
    """Layers that run in this thread inside the `with` hand their attention to `attend`.

    With `see_mask` their masks go there, and else nowhere: without it they must not have any.
    """
    before = _current.attend, _current.see_mask
    _current.attend, _current.see_mask = attend, see_mask
    try:
        yield
    finally:
        _current.attend, _current.see_mask = before


def attention_function(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: q, k, v of shape [1, H, T, D] -> out of shape [1, T, H, D].

    InvalidRequest where the layer asks for something that the callback cannot do (soft capping, sinks, a mask).
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q_THD, k_THD, v_THD = (x[0].transpose(0, 1) for x in (query, key, value))
    layer: Any = module.layer_idx
    out_THD = attend_rows(layer, q_THD, k_THD, v_THD, scale, attention_mask, options, dropout)
    return out_THD[None], None


def attend_rows(
    layer: int,
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    scale: float,
    attention_mask: torch.Tensor | None,
    options: Mapping[str, Any],
    dropout: float = 0.0,
) -> torch.Tensor:
    """The same without transformers' axes, for layers of our own: what `Attend` returns."""
    _refuse_unknown(options, dropout)
    if _current.see_mask is not None:
        _current.see_mask(layer, attention_mask)
    elif attention_mask is not None:
        raise InvalidRequest("the model makes an attention mask of its own; only causal and sliding-window work")
    attend = _current.attend
    assert attend is not None, "a model runs through Model.forward only"
    return attend(layer, q_THD, k_THD, v_THD, scale)


def attend_to_self(
    _layer: int, q_THD: torch.Tensor, _k_THD: torch.Tensor, v_THD: torch.Tensor, _scale: float
) -> torch.Tensor:
    """An `Attend` under which every token sees itself alone: for looking at a model with no KV cache."""
    return v_THD.repeat_interleave(q_THD.shape[1] // v_THD.shape[1], dim=1)


def _refuse_unknown(options: Mapping[str, Any], dropout: float) -> None:
    """InvalidRequest for an option with a value that would change the attention."""
    if dropout:
        raise InvalidRequest(f"the model asks for attention dropout {dropout} while it serves")
    for name, value in options.items():
        if name not in _HARMLESS and value is not None and value is not False:
            raise InvalidRequest(f"the model's attention needs {name!r}, which paged attention here does not have")


AttentionInterface.register(NAME, attention_function)

"""What a transformers model does with attention, found out by running two tokens through it.

The config says it in dozens of ways, so the model is asked instead:

1. Which masks its layers get. Under the probing name transformers calls our mask function with a predicate
   (query index, key index) -> visible; evaluated at the end of the context it tells full attention from a sliding
   window, and both from what a paged cache cannot do (chunks, looking ahead).
2. Whether a token depends on other tokens outside of attention (convolutions, recurrent layers, rotary embeddings
   that change with the longest sequence at hand). One token is run twice, with two different companions at different
   positions, while attention shows it only itself: nothing may change.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...kernels.shapes import LayerShape
from ...proto.errors import InvalidRequest
from .. import attention
from ..lean_imports import AttentionInterface, AttentionMaskInterface, PreTrainedModel

_PROBE = "isthmus-probe"
_NEAR = 17  # position of the token that must not change: small, and with every rotary frequency at work
_TOLERANCE = 0.2  # relative change; rounding stays far below, and a real dependency far above

MaskPredicate = Callable[..., torch.Tensor]  # (batch, head, query index, key index) -> visible


def probe_layers(net: PreTrainedModel, layers: int, context_length: int) -> tuple[LayerShape, ...]:
    """The KV shape of each layer; InvalidRequest for a model that cannot run exactly in a ragged batch."""
    far = context_length - 1
    near = min(_NEAR, far)
    assert net.config._attn_implementation == attention.NAME
    with torch.inference_mode():
        net.set_attn_implementation(_PROBE)
        try:
            seen = _run(net, tokens=(1, 2), positions=(0, 1), masks=True)
        finally:
            net.set_attn_implementation(attention.NAME)
        first = _run(net, tokens=(3, 2), positions=(near, 0))
        second = _run(net, tokens=(3, 5), positions=(near, far))
    missing = sorted(set(range(layers)) - set(seen.shapes))
    if missing or len(seen.shapes) != layers:
        raise InvalidRequest(
            f"layers {missing} do not use transformers' attention interface (recurrent or convolutional layers, or "
            "older model code)"
        )
    _check_independence(first, second)
    windows = {mask: _window(seen.predicates[mask], context_length) for mask in set(seen.mask_of.values())}
    return tuple(
        LayerShape(kv_heads=heads, head_dim=dim, window=windows[seen.mask_of[layer]])
        for layer, (heads, dim) in sorted(seen.shapes.items())
    )


def probe_shapes(net: PreTrainedModel) -> list[tuple[int, int]]:
    """KV heads and head dimension of each layer, also of a model without memory (on the device "meta")."""
    with torch.inference_mode():
        seen = _run(net, tokens=(1, 2), positions=(0, 1))
    return [shape for _, shape in sorted(seen.shapes.items())]


@dataclass
class _Recording:
    """What the layers of one forward handed over."""

    shapes: dict[int, tuple[int, int]] = field(default_factory=dict)  # layer -> (kv heads, head dim)
    mask_of: dict[int, int] = field(default_factory=dict)  # layer -> index in `predicates`
    predicates: list[MaskPredicate] = field(default_factory=list)
    first_row: list[torch.Tensor] = field(default_factory=list)  # q and k of row 0, layer by layer, then logits

    def attend(self, layer: int, q_THD: torch.Tensor, k_THD: torch.Tensor, v_THD: torch.Tensor, scale: float):
        if k_THD.shape != v_THD.shape:
            raise InvalidRequest(
                f"keys of {k_THD.shape[-1]} and values of {v_THD.shape[-1]} dimensions (latent attention) do not fit "
                "into KV pages; both must be the same"
            )
        if layer in self.shapes:
            raise InvalidRequest(f"the model runs attention layer {layer} twice for one token")
        self.shapes[layer] = (k_THD.shape[1], k_THD.shape[2])
        self.first_row += [q_THD[0].float(), k_THD[0].float()]
        return attention.attend_to_self(layer, q_THD, k_THD, v_THD, scale)

    def see_mask(self, layer: int, mask: torch.Tensor | None) -> None:
        if mask is None:
            raise InvalidRequest("the model makes no attention mask by transformers' mask interface")
        self.mask_of[layer] = int(mask.flatten()[0])


_recording: _Recording | None = None  # of the probing name; models are loaded one at a time


def _run(
    net: PreTrainedModel, tokens: tuple[int, int], positions: tuple[int, int], *, masks: bool = False
) -> _Recording:
    global _recording
    _recording = recording = _Recording()
    try:
        with attention.attending(recording.attend, recording.see_mask if masks else None):
            logits = net(
                input_ids=torch.tensor([tokens], device=net.device),
                position_ids=torch.tensor([positions], device=net.device),
                use_cache=False,
            ).logits
    finally:
        _recording = None
    recording.first_row.append(logits[0, 0].float())
    return recording


def _probe_mask(batch_size: int, q_length: int, kv_length: int, mask_function: MaskPredicate, **options: Any):
    """The mask function under the probing name: a "mask" filled with the number of its predicate."""
    assert _recording is not None
    _recording.predicates.append(mask_function)
    number = len(_recording.predicates) - 1
    return torch.full((batch_size, 1, q_length, kv_length), number, device=options.get("device"))


AttentionInterface.register(_PROBE, attention.attention_function)
AttentionMaskInterface.register(_PROBE, _probe_mask)


def _check_independence(first: _Recording, second: _Recording) -> None:
    for before, after in zip(first.first_row, second.first_row, strict=True):
        change = (before - after).norm() / before.norm().clamp_min(1e-9)
        if not change < _TOLERANCE:
            raise InvalidRequest(
                "a token of this model depends on other tokens outside of attention (recurrent or convolutional "
                "layers, or rotary embeddings that follow the length); it cannot run in a batch of many requests"
            )


def _window(predicate: MaskPredicate, context_length: int) -> int | None:
    """How many tokens a query sees, itself included; None for all before it."""
    seen = {_seen(predicate, query, context_length) for query in (context_length - 1, context_length - 2)}
    window = seen.pop()
    if seen or window == 0:
        raise InvalidRequest("layers attend in chunks or by some other pattern than a causal sliding window")
    return window


def _seen(predicate: MaskPredicate, query: int, context_length: int) -> int | None:
    """The same for one query; 0 where what it sees is no window that ends with it."""
    zero = torch.zeros((), dtype=torch.long)
    visible = predicate(zero, zero, torch.tensor(query), torch.arange(context_length)).expand(context_length)
    count = int(visible.sum())
    if not 0 < count <= query + 1 or not bool(visible[query - count + 1 : query + 1].all()):
        return 0
    return None if count == query + 1 else count

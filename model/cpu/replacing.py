"""Replacing modules of a transformers model by ones that do the same in fewer operations.

Nothing is taken on trust: a module is replaced only where its replacement gives the same on the inputs that a first
forward of the model brought it. What does not match stays as it is.

Letters of tensor shapes: T tokens, H heads, D head dimension.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import attend_to_self, attending
from ..lean_imports import PreTrainedModel

log = logging.getLogger(__name__)

Make = Callable[[Any], nn.Module | None]


def replace_modules(net: PreTrainedModel, fits: Callable[[Any], bool], make: Make) -> None:
    """Each module that `fits` by `make(module)`, where there is one and its outputs are the same within rounding."""
    failures: dict[str, str] = {}  # by class: one line for all layers
    for place in _places(net, fits):
        try:
            fused = make(place.module) if place.inputs else None
            if fused is not None and _same(place.module, fused, *place.inputs):
                setattr(place.parent, place.name, fused)
        except Exception as error:  # of compilers and libraries, of any kind: the module stays
            failures.setdefault(type(place.module).__name__, str(error).partition("\n")[0] or type(error).__name__)
        place.module = place.inputs = None  # one at a time: its weights go before the next one's are joined
    for kind, reason in failures.items():
        log.warning("modules of class %s stay as they are: %s", kind, reason)


@dataclass(eq=False)
class _Place:
    """A module that may be replaced, and what it was called with."""

    parent: nn.Module
    name: str
    module: Any
    inputs: Any = None  # (args, kwargs)


def _places(net: PreTrainedModel, fits: Callable[[nn.Module], bool]) -> list[_Place]:
    """All modules that fit, with the inputs that one forward of the whole model brings them."""
    found = [
        _Place(parent, name, child)
        for parent in net.modules()
        for name, child in parent.named_children()
        if fits(child)
    ]
    hooks = [place.module.register_forward_pre_hook(_recorder(place), with_kwargs=True) for place in found]
    try:
        if found:
            with attending(attend_to_self):
                net(
                    input_ids=torch.tensor([[1, 2, 3]], device=net.device),
                    position_ids=torch.tensor([[5, 0, 11]], device=net.device),
                    use_cache=False,
                )
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _recorder(place: _Place) -> Callable[..., None]:
    def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        place.inputs = args, kwargs

    return record


def _same(module: nn.Module, fused: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether both give the same, to the caller and, of an attention layer, to the attention function."""
    results = []
    for either in (module, fused):
        handed: list[Any] = []

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, handed: list[Any] = handed) -> Tensor:
            handed += [torch.tensor([layer, scale]), q, k, v]
            return attend_to_self(layer, q, k, v, scale)

        with attending(attend):
            out = either(*args, **kwargs)
        results.append((type(out), [*handed, out[0] if isinstance(out, tuple) else out]))
    (kind, ours), (other_kind, theirs) = results
    return kind is other_kind and len(ours) == len(theirs) and all(map(close, ours, theirs))


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same within rounding."""
    tolerance = 1e-5 if a.dtype == torch.float32 else 2e-2
    return a.shape == b.shape and a.dtype == b.dtype and bool((a - b).abs().max() <= tolerance * a.abs().max())

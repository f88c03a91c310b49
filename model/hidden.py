"""The final hidden states of a forward: logits of many of its tokens, a few at once.

The head of a model is more than one matrix (scaling, soft capping), and only its own code knows it all. So that code
runs once more, on some rows of what its layers made before.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .lean_imports import PreTrainedModel


class HiddenStates:
    """What the layers of a network made of T tokens. Valid until its next forward; one thread uses both."""

    def __init__(self, net: PreTrainedModel, output: Any) -> None:
        """`output`: of the network without its head, for one batch of T tokens."""
        self._net, self._output = net, output

    def logits(self, rows_R: Tensor) -> Tensor:
        """Logits [R, V], float32, of some of the tokens, as the forward makes them."""
        base: Any = self._net.base_model
        hidden_1RE = self._output.last_hidden_state[:, rows_R.to(self._output.last_hidden_state.device)]
        output = dataclasses.replace(self._output, last_hidden_state=hidden_1RE)
        own = base.__dict__.get("forward")
        base.forward = lambda *_, **__: output
        try:
            with torch.inference_mode():
                ids_1R = torch.zeros(hidden_1RE.shape[:2], dtype=torch.long, device=hidden_1RE.device)
                return self._net(input_ids=ids_1R, use_cache=False).logits[0].float()
        finally:
            del base.forward
            if own is not None:
                base.forward = own


@contextmanager
def kept_hidden(net: PreTrainedModel) -> Iterator[Callable[[], HiddenStates]]:
    """Around a forward: what is yielded gives its hidden states afterwards."""
    base = net.base_model
    assert base is not net, f"{type(net).__name__} has no head of its own"
    last: list[Any] = [None]

    def keep(_module: object, _inputs: object, output: Any) -> None:
        last[0] = output  # a forward within this one, between its layers, comes before its own

    handle = base.register_forward_hook(keep)
    try:
        yield lambda: HiddenStates(net, last[0])
    finally:
        handle.remove()

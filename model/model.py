"""A transformers model as the workers see it: tokens of many sequences in, logits out, attention left to the caller.

Letters of tensor shapes: T tokens of the ragged batch, R rows whose logits are wanted, V vocabulary.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from ..kernels.shapes import LayerShape
from .attention import Attend, attending
from .hidden import HiddenStates, kept_hidden
from .lean_imports import PreTrainedModel


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A loaded model. Forwards of different models may run in different threads at once."""

    name: str
    fingerprint: str
    architecture: str
    path: Path
    context_length: int  # tokens, prompt and output together
    vocab_size: int
    eos_token_ids: frozenset[int]
    layers: tuple[LayerShape, ...]
    dtype: torch.dtype  # of activations and KV
    weight_dtype: torch.dtype
    device: torch.device
    net: PreTrainedModel

    @property
    def can_score(self) -> bool:
        """Whether `on_hidden` of a forward can be asked for: its head is apart from its layers."""
        return self.net.base_model is not self.net

    def forward(
        self,
        token_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        logit_rows_R: torch.Tensor,
        attend: Attend,
        on_hidden: Callable[[HiddenStates], None] | None = None,
    ) -> torch.Tensor:
        """Logits [R, V], float32, of the rows wanted (none: [0, V]).

        `attend` is called once for each layer, in order, in this thread. Tokens of several sequences may stand in any
        order: nothing but `attend` lets one see another. The three tensors are integers of any device. `on_hidden` is
        called once after the forward.
        """
        keeping = kept_hidden(self.net) if on_hidden is not None else nullcontext()
        with torch.inference_mode(), attending(attend), keeping as hidden:
            logits_1RV = self.net(
                input_ids=token_ids_T.to(self.device)[None],
                position_ids=positions_T.to(self.device)[None],
                use_cache=False,
                logits_to_keep=logit_rows_R.to(self.device),
            ).logits
        if on_hidden is not None and hidden is not None:
            on_hidden(hidden())
        return logits_1RV[0].float()

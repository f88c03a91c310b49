"""A transformers model as the workers see it: tokens of many sequences in, logits out, attention left to the caller.

Letters of tensor shapes: T tokens of the ragged batch, R rows whose logits are wanted, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..kernels.shapes import LayerShape
from .attention import Attend, attending
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

    def forward(
        self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, logit_rows_R: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Logits [R, V], float32, of the rows wanted (none: [0, V]).

        `attend` is called once for each layer, in order, in this thread. Tokens of several sequences may stand in any
        order: nothing but `attend` lets one see another. The three tensors are integers of any device.
        """
        with torch.inference_mode(), attending(attend):
            logits_1RV = self.net(
                input_ids=token_ids_T.to(self.device)[None],
                position_ids=positions_T.to(self.device)[None],
                use_cache=False,
                logits_to_keep=logit_rows_R.to(self.device),
            ).logits
        return logits_1RV[0].float()

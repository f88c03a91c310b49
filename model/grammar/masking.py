"""Rules out, in the logits of a step, what grammars do not allow; and finds out what that is while the forward runs.

Letters of tensor shapes: R rows, N of them with a grammar, V vocabulary, W words of 32 tokens.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from .constraint import Constraint

Constrained = tuple[Constraint, Sequence[int]]  # with the output so far


class MaskThread:
    """Of one engine. It computes the masks of a step; who asks for one that is not there computes it itself."""

    def __init__(self, name: str) -> None:
        self._threads = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-masks")  # started with the first mask

    def begin(self, rows: Iterable[tuple[Constraint | None, Sequence[int]]]) -> None:
        """Has the masks of these rows computed; outputs must stay as they are until the step has drawn its tokens."""
        constrained = [(constraint, output) for constraint, output in rows if constraint is not None]
        if constrained:
            self._threads.submit(_compute, constrained)


def _compute(rows: Sequence[Constrained]) -> None:
    for constraint, output in rows:
        constraint.allowed(output)


def mask(logits_RV: Tensor, rows: Sequence[tuple[int, Constraint, Sequence[int]]]) -> Tensor:
    """The logits, -inf where a grammar does not allow a token. `rows`: place, grammar and output so far of some rows.

    A row whose grammar has failed stays as it is: its token will be refused (`Constraint.refusal`).
    """
    known = [(index, bits_W) for index, of, output in rows if (bits_W := of.allowed(output)) is not None]
    if not known:
        return logits_RV
    allowed_NV = _as_booleans(np.stack([bits_W for _, bits_W in known]), logits_RV)
    if len(known) == logits_RV.shape[0]:
        return torch.where(allowed_NV, logits_RV, -torch.inf)
    index_N = torch.tensor([index for index, _ in known], device=logits_RV.device)
    masked_RV = logits_RV.clone()
    masked_RV[index_N] = torch.where(allowed_NV, logits_RV[index_N], -torch.inf)
    return masked_RV


def _as_booleans(bits_NW: np.ndarray, like_RV: Tensor) -> Tensor:
    """Bits [N, W], as booleans [N, V] where the logits are."""
    vocabulary = like_RV.shape[1]
    if like_RV.device.type == "cpu":
        unpacked = np.unpackbits(bits_NW.view(np.uint8), axis=1, count=vocabulary, bitorder="little")
        return torch.from_numpy(unpacked).view(torch.bool)
    words_NW1 = torch.from_numpy(bits_NW).to(like_RV.device)[:, :, None]
    places_32 = torch.arange(32, dtype=torch.int32, device=like_RV.device)
    return (words_NW1 >> places_32 & 1).bool().flatten(1)[:, :vocabulary]

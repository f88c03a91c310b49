"""Log-probabilities of a prompt's own tokens, chunk by chunk; logits exist of a few tokens at once only."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..proto.common_pb2 import SamplingParams, TokenLogprobs
from ..proto.errors import InvalidRequest
from .hidden import HiddenStates
from .model import Model
from .sampling import logprobs_of

BLOCK_BYTES = 32 << 20  # of logits at once, in fp32; a few tensors of that size
HOST_BYTES, HOST_TOP_BYTES = 64, 48  # about what a token takes in messages, and each of its most likely ones


@dataclass(frozen=True)
class ScoredTokens:
    """The log-probabilities of some tokens of a prompt, one after the other."""

    first: int  # position of the first of them, from 1 on: nothing comes before the first token of a prompt
    logprobs: tuple[TokenLogprobs, ...]


def score_chunk(
    hidden: HiddenStates, row: int, prompt: Sequence[int], start: int, end: int, top: int, vocab_size: int
) -> ScoredTokens:
    """Of the tokens that follow those at [start, end) of a prompt, whose hidden states begin at `row`."""
    rows = max(1, BLOCK_BYTES // (4 * vocab_size))
    last = min(end, len(prompt) - 1)
    made: list[TokenLogprobs] = []
    for at in range(start, last, rows):
        tokens = prompt[at + 1 : min(at + rows, last) + 1]
        logits_RV = hidden.logits(torch.arange(row + at - start, row + at - start + len(tokens)))
        made += [each.to_pb() for each in logprobs_of(logits_RV, tokens, [top] * len(tokens))]
    return ScoredTokens(start + 1, tuple(made))


def check_scored(sampling: SamplingParams, model: Model) -> None:
    """InvalidRequest where log-probabilities of the prompt are asked for that the model cannot tell."""
    if sampling.HasField("prompt_logprobs") and not model.can_score:
        raise InvalidRequest(
            f"prompt_logprobs is set; allowed: not with {model.name}, whose head is one with its layers"
        )


def host_bytes(tokens: int, top: int | None) -> int:
    """About what the log-probabilities of a prompt take in host memory; None: they are not asked for."""
    return 0 if top is None else tokens * (HOST_BYTES + HOST_TOP_BYTES * top)

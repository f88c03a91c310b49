"""From logits to tokens, for a batch of requests that each have their own options.

The steps, in the order that transformers' `generate` has them:

1. penalties: repetition (Keskar et al., CTRL, arXiv 1909.05858, section 4.1), then presence and frequency; then the
   request's own biases (`logit_bias`) are added;
2. tokens that would end the output before min_tokens are ruled out;
3. temperature 0 takes the most likely token; otherwise logits are divided by the temperature;
4. top_k keeps the k most likely tokens;
5. top_p keeps the fewest tokens that reach probability p (Holtzman et al., arXiv 1904.09751), of what top_k left;
6. min_p keeps tokens at least min_p times as likely as the most likely one (Nguyen et al., arXiv 2407.01082);
7. each token that is left gets a Gumbel number of (seed, position, token) alone, and the greatest sum with its logit
   wins: a draw from their distribution (the Gumbel-max trick, e.g. Maddison et al., arXiv 1411.0030, section 2).
   Rounding that differs between batches changes the winner only where two sums nearly tie, of which the chance is that
   of the rounding itself. Running sums over a vocabulary would move every token's border by it.

A limit keeps or drops tokens of equal probability together, so nothing depends on how a sort orders them. A row's
result depends on its own logits and options only, never on the rows beside it.

All of this is in fp32 and, where weights are summed, in fp64. Options near their bounds (a temperature of 1e-39) leave
the range of fp32: a row whose winner is no usual number is drawn once more in fp64, from logits less the greatest one,
so that a temperature towards 0 comes to be greedy, and tokens that tie are drawn from.

Letters of tensor shapes: R rows, V vocabulary, K most likely tokens, N tokens of a list.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from ..proto.common_pb2 import TokenLogprobs, TopLogprob
from ..proto.sampling import Sampling, fork_sampling
from .noise import gumbel, place_key
from .penalties import PenalisedRow, SeenTokens, add_biases, penalise, penalises

# Above it fp32 adds Gumbel numbers to logits in steps of 2 or more, and may have overflowed on the way.
_MOST = 2.0**24
_LEAST_LOGPROB = torch.finfo(torch.float32).min
_BEST = 1024  # limits are looked for among so many most likely tokens before the whole vocabulary is sorted


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One request at one step."""

    sampling: Sampling
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    eos_token_ids: frozenset[int]
    seen: SeenTokens | None = None  # kept by the caller from step to step, so that a step counts its own token only

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature == 0

    @property
    def limited(self) -> bool:
        s = self.sampling
        return s.top_k > 0 or s.top_p < 1 or s.min_p > 0

    @property
    def ruled_out(self) -> frozenset[int]:
        """Tokens that would end the output too early."""
        s = self.sampling
        if len(self.output_token_ids) >= s.min_tokens:
            return frozenset()
        return s.stop_token_ids if s.ignore_eos else s.stop_token_ids | self.eos_token_ids

    @property
    def key(self) -> int:
        """Of the random numbers for the token that comes next."""
        return place_key(self.sampling.seed, len(self.prompt_token_ids) + len(self.output_token_ids))


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural logarithms of probabilities in the model's own distribution: no penalties, biases or temperature."""

    logprob: float  # of the token that was chosen
    top: tuple[tuple[int, float], ...]  # (token id, logprob), most likely first

    def to_pb(self) -> TokenLogprobs:
        """As the wire has them."""
        top = [TopLogprob(token_id=token, logprob=value) for token, value in self.top]
        return TokenLogprobs(logprob=self.logprob, top=top)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What a row drew."""

    token_id: int
    logprobs: Logprobs | None = None

    @classmethod
    def from_pb(cls, token_id: int, logprobs: TokenLogprobs | None) -> Self:
        """As another worker drew it."""
        if logprobs is None:
            return cls(token_id)
        return cls(token_id, Logprobs(logprobs.logprob, tuple((top.token_id, top.logprob) for top in logprobs.top)))

    def logprobs_pb(self) -> TokenLogprobs | None:
        """The log-probabilities as the wire has them; None where they were not asked for."""
        return None if self.logprobs is None else self.logprobs.to_pb()


def sample(logits_RV: Tensor, rows: Sequence[SampleRow]) -> list[SampledToken]:
    """One token for each row. `logits_RV`: float32, row r of `rows[r]`; it is left as it is."""
    assert logits_RV.shape[0] == len(rows), "one row of logits for each request"
    with torch.inference_mode():
        token_R, score_R = _choose(_adjust(logits_RV, rows), rows)
        tokens, scores = token_R.tolist(), score_R.tolist()
        extreme = [index for index, score in enumerate(scores) if not abs(score) <= _MOST]  # NaN is not
        if extreme:
            chosen = _choose_extreme(logits_RV[extreme].double(), [rows[index] for index in extreme])
            for index, token in zip(extreme, chosen.tolist(), strict=True):
                tokens[index] = token
        logprobs = _logprobs(logits_RV, rows, tokens)
    return [SampledToken(token, logprobs.get(index)) for index, token in enumerate(tokens)]


def sample_forks(logits_V: Tensor, row: SampleRow, forks: int) -> tuple[SampledToken, ...]:
    """The first tokens of so many answers that follow a first one to the same prompt."""
    rows = [replace(row, sampling=fork_sampling(row.sampling, number), seen=None) for number in range(1, forks + 1)]
    return tuple(sample(logits_V.expand(forks, -1), rows)) if forks else ()


def _choose(adjusted_RV: Tensor, rows: Sequence[SampleRow]) -> tuple[Tensor, Tensor]:
    """Steps 3 to 7: token ids [R] and the scores [R] by which they won."""
    drawn = [index for index, row in enumerate(rows) if not row.greedy]
    if len(drawn) == len(rows):
        return _draw(adjusted_RV, rows)
    token_R, score_R = _greatest(adjusted_RV)
    if drawn:
        token_R[drawn], score_R[drawn] = _draw(adjusted_RV[drawn], [rows[index] for index in drawn])
    return token_R, score_R


def _choose_extreme(logits_RV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """All steps in fp64: token ids [R]. Where step 2 leaves no token at all, it is left out."""
    penalised_RV, adjusted_RV = _adjust(logits_RV, rows, rule_out=False), _adjust(logits_RV, rows)
    greatest_R1 = adjusted_RV.amax(-1, keepdim=True)
    adjusted_RV = torch.where(greatest_R1 == -torch.inf, penalised_RV, adjusted_RV)
    return _choose(adjusted_RV - adjusted_RV.amax(-1, keepdim=True), rows)[0]


def _adjust(logits_RV: Tensor, rows: Sequence[SampleRow], *, rule_out: bool = True) -> Tensor:
    """Steps 1 and 2, or 1 alone; the same tensor where there is nothing to do."""
    penalised = [_penalised(index, row) for index, row in enumerate(rows) if penalises(row.sampling)]
    biased = [(index, row.sampling) for index, row in enumerate(rows) if row.sampling.logit_bias]
    ruled_out = [(index, token) for index, row in enumerate(rows) for token in sorted(row.ruled_out) if rule_out]
    if not penalised and not biased and not ruled_out:
        return logits_RV
    adjusted_RV = logits_RV.clone(memory_format=torch.contiguous_format)
    if penalised:
        penalise(adjusted_RV, penalised)
    if biased:
        add_biases(adjusted_RV, biased)
    vocabulary = logits_RV.shape[1]
    pairs = [(index, token) for index, token in ruled_out if token < vocabulary]
    if pairs:
        row_N, token_N = torch.tensor(pairs, device=logits_RV.device).unbind(1)
        adjusted_RV[row_N, token_N] = -torch.inf
    return adjusted_RV


def _penalised(index: int, row: SampleRow) -> PenalisedRow:
    seen = SeenTokens(row.sampling, row.prompt_token_ids) if row.seen is None else row.seen
    return PenalisedRow(index, row.sampling, seen, row.output_token_ids)


def _draw(logits_RV: Tensor, rows: Sequence[SampleRow]) -> tuple[Tensor, Tensor]:
    """Steps 3 to 7 of rows that are not greedy: token ids [R] and their scores [R].

    Limits are looked for in weights of float64, proportional to probabilities. They mostly leave a few tokens, so the
    most likely ones are tried before the whole vocabulary.
    """
    limited = [index for index, row in enumerate(rows) if row.limited]
    if not limited:
        return _draw_of_all(logits_RV, rows)
    token_R = torch.empty(len(rows), dtype=torch.long, device=logits_RV.device)
    score_R = torch.empty(len(rows), dtype=logits_RV.dtype, device=logits_RV.device)
    token_R[limited], score_R[limited], settled = _draw_of_best(logits_RV[limited], [rows[i] for i in limited])
    done = {index for index, is_settled in zip(limited, settled, strict=True) if is_settled}
    rest = [index for index in range(len(rows)) if index not in done]
    if rest:
        token_R[rest], score_R[rest] = _draw_of_all(logits_RV[rest], [rows[index] for index in rest])
    return token_R, score_R


def _draw_of_best(logits_RV: Tensor, rows: Sequence[SampleRow]) -> tuple[Tensor, Tensor, list[bool]]:
    """Token ids [R] drawn from the most likely tokens, their scores [R], and for which rows these are all that the
    limits keep."""
    vocabulary = logits_RV.shape[1]
    best = logits_RV.topk(min(_BEST, vocabulary))
    weight_RK = _weights(best.values, best.values[:, :1], rows)
    total_R1 = weight_RK.new_zeros(len(rows), 1)
    if any(row.sampling.top_p < 1 and not row.sampling.top_k for row in rows):
        total_R1 = _weights(logits_RV, best.values[:, :1], rows).sum(-1, keepdim=True)
    least_R1 = _least_kept(weight_RK, total_R1, rows)
    # What is NaN, of an infinite logit, counts as kept: its score tells that the row is an extreme one.
    # The list must go on below what is kept: tokens as likely as its last one may stand outside of it.
    settled_R = (weight_RK[:, -1] < least_R1[:, 0]) | (weight_RK.shape[1] == vocabulary)
    place_R, score_R = _pick(_scaled(best.values, rows), best.indices, rows, ~(weight_RK < least_R1))
    return best.indices.gather(1, place_R[:, None])[:, 0], score_R, settled_R.tolist()


def _draw_of_all(logits_RV: Tensor, rows: Sequence[SampleRow]) -> tuple[Tensor, Tensor]:
    """Token ids [R] drawn from all that the limits keep, and their scores [R]."""
    kept_RV = None
    if any(row.limited for row in rows):
        weight_RV = _weights(logits_RV, logits_RV.amax(-1, keepdim=True), rows)
        sorted_RV = weight_RV.sort(-1, descending=True).values
        kept_RV = ~(weight_RV < _least_kept(sorted_RV, sorted_RV.sum(-1, keepdim=True), rows))
    token_1V = torch.arange(logits_RV.shape[1], device=logits_RV.device)[None]
    return _pick(_scaled(logits_RV, rows), token_1V, rows, kept_RV)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _scaled(logits_RK: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Step 3: logits over temperature, where one is not 1."""
    if all(row.sampling.temperature == 1 for row in rows):
        return logits_RK
    return logits_RK / _column([row.sampling.temperature for row in rows], logits_RK)


def _weights(logits_RK: Tensor, greatest_R1: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Numbers [R, K] proportional to probability; the most likely token's is 1."""
    return _scaled((logits_RK - greatest_R1).double(), rows).exp()


def _least_kept(descending_RK: Tensor, total_R1: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Steps 4 to 6: the least weight [R, 1] that is kept, of weights in descending order.

    `total_R1` is the sum over the vocabulary. A limit that lies beyond the end of the list gives its last weight.
    """
    options = [row.sampling for row in rows]
    last = descending_RK.shape[1] - 1
    least_R1 = _column([s.min_p for s in options], descending_RK)
    if any(s.top_k for s in options):
        place_R1 = _column([min(s.top_k - 1, last) if s.top_k else last for s in options], descending_RK).long()
        limits_R1 = _column([s.top_k > 0 for s in options], descending_RK).bool()
        kth_R1 = torch.where(limits_R1, descending_RK.gather(1, place_R1), 0)
        descending_RK = torch.where(descending_RK >= kth_R1, descending_RK, 0)
        total_R1 = torch.where(limits_R1, descending_RK.sum(-1, keepdim=True), total_R1)
        least_R1 = torch.maximum(least_R1, kth_R1)
    if any(s.top_p < 1 for s in options):
        wanted_R1 = total_R1 * _column([s.top_p for s in options], descending_RK)
        place_R1 = torch.searchsorted(descending_RK.cumsum(-1), wanted_R1).clamp_max(last)
        limits_R1 = _column([s.top_p < 1 for s in options], descending_RK).bool()
        least_R1 = torch.maximum(least_R1, torch.where(limits_R1, descending_RK.gather(1, place_R1), 0))
    return least_R1


def _pick(
    scaled_RK: Tensor, token_RK: Tensor, rows: Sequence[SampleRow], kept_RK: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Step 7, of the tokens [R, K] or [1, K] that are kept: places [R] and scores [R]."""
    score_RK = gumbel([row.key for row in rows], token_RK) + scaled_RK
    if kept_RK is not None:
        score_RK = torch.where(kept_RK, score_RK, -torch.inf)
    return _greatest(score_RK)


def _greatest(score_RK: Tensor) -> tuple[Tensor, Tensor]:
    """The first place [R] of the greatest score of each row, and the score [R]."""
    place_R1 = score_RK.argmax(-1, keepdim=True)
    return place_R1[:, 0], score_RK.gather(1, place_R1)[:, 0]


def _logprobs(logits_RV: Tensor, rows: Sequence[SampleRow], tokens: Sequence[int]) -> dict[int, Logprobs]:
    """Of the rows that ask for them."""
    asked = {index: row.sampling.logprobs for index, row in enumerate(rows) if row.sampling.logprobs is not None}
    if not asked:
        return {}
    some = torch.tensor(list(asked), device=logits_RV.device)
    made = logprobs_of(logits_RV[some], [tokens[index] for index in asked], list(asked.values()))
    return dict(zip(asked, made, strict=True))


def logprobs_of(logits_RV: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[Logprobs]:
    """Of one token of each row, and of so many of its most likely ones."""
    logprob_RV = logits_RV.log_softmax(-1).clamp_min(_LEAST_LOGPROB)
    chosen_R1 = torch.tensor(tokens, device=logits_RV.device)[:, None]
    chosen = logprob_RV.gather(1, chosen_R1)[:, 0].tolist()
    best = logprob_RV.topk(min(max(counts), logits_RV.shape[1]))
    return [
        Logprobs(logprob, tuple(zip(ids[:count], values[:count], strict=True)))
        for logprob, ids, values, count in zip(
            *(chosen, best.indices.tolist(), best.values.tolist(), counts), strict=True
        )
    ]

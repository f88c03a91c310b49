"""From logits to tokens, for a batch of requests that each have their own options.

The steps, in the order that transformers' `generate` has them:

1. penalties: repetition (Keskar et al., CTRL, arXiv 1909.05858, section 4.1), then presence and frequency;
2. tokens that would end the output before min_tokens are ruled out;
3. temperature 0 takes the most likely token; otherwise logits are divided by the temperature;
4. top_k keeps the k most likely tokens;
5. top_p keeps the fewest tokens that reach probability p (Holtzman et al., arXiv 1904.09751), of what top_k left;
6. min_p keeps tokens at least min_p times as likely as the most likely one (Nguyen et al., arXiv 2407.01082);
7. one uniform number, of (seed, position) alone, picks the token: the first, in the order of the vocabulary, at which
   the running sum of probabilities passes it.

A limit keeps or drops tokens of equal probability together, so nothing depends on how a sort orders them. A row's
result depends on its own logits and options only, never on the rows beside it.

Letters of tensor shapes: R rows, V vocabulary, K most likely tokens, N entries of a list of (row, token) pairs.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..proto.common_pb2 import TokenLogprobs, TopLogprob
from ..proto.sampling import Sampling
from .uniform import uniform

_NUCLEUS = 1024  # top_p looks at this many most likely tokens before it sorts the whole vocabulary


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One request at one step."""

    sampling: Sampling
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    eos_token_ids: frozenset[int]

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature == 0

    @property
    def penalised(self) -> bool:
        s = self.sampling
        return s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0

    @property
    def ruled_out(self) -> frozenset[int]:
        """Tokens that would end the output too early."""
        s = self.sampling
        if len(self.output_token_ids) >= s.min_tokens:
            return frozenset()
        return s.stop_token_ids if s.ignore_eos else s.stop_token_ids | self.eos_token_ids

    def uniform(self) -> float:
        """The random number of the token that comes next."""
        return uniform(self.sampling.seed, len(self.prompt_token_ids) + len(self.output_token_ids))


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural logarithms of probabilities in the model's own distribution: no penalties, no temperature."""

    logprob: float  # of the token that was chosen
    top: tuple[tuple[int, float], ...]  # (token id, logprob), most likely first


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What a row drew."""

    token_id: int
    logprobs: Logprobs | None = None

    def logprobs_pb(self) -> TokenLogprobs | None:
        """The log-probabilities as the wire has them; None where they were not asked for."""
        if self.logprobs is None:
            return None
        top = [TopLogprob(token_id=token, logprob=value) for token, value in self.logprobs.top]
        return TokenLogprobs(logprob=self.logprobs.logprob, top=top)


def sample(logits_RV: Tensor, rows: Sequence[SampleRow]) -> list[SampledToken]:
    """One token for each row. `logits_RV`: float32, row r of `rows[r]`; it is left as it is."""
    assert logits_RV.shape[0] == len(rows), "one row of logits for each request"
    with torch.inference_mode():
        adjusted_RV = _adjust(logits_RV, rows)
        token_R = adjusted_RV.argmax(-1)
        drawn = [index for index, row in enumerate(rows) if not row.greedy]
        if drawn:
            some = torch.tensor(drawn, device=logits_RV.device)
            token_R[some] = _draw(adjusted_RV[some], [rows[index] for index in drawn])
        tokens = token_R.tolist()
        logprobs = _logprobs(logits_RV, rows, tokens)
    return [SampledToken(token, logprobs.get(index)) for index, token in enumerate(tokens)]


def _adjust(logits_RV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Steps 1 and 2; the same tensor where there is nothing to do."""
    penalised = [index for index, row in enumerate(rows) if row.penalised]
    ruled_out = [(index, token) for index, row in enumerate(rows) for token in sorted(row.ruled_out)]
    if not penalised and not ruled_out:
        return logits_RV
    adjusted_RV = logits_RV.clone()
    if penalised:
        _penalise(adjusted_RV, rows, penalised)
    vocabulary = logits_RV.shape[1]
    pairs = [(index, token) for index, token in ruled_out if token < vocabulary]
    if pairs:
        row_N, token_N = torch.tensor(pairs, device=logits_RV.device).unbind(1)
        adjusted_RV[row_N, token_N] = -torch.inf
    return adjusted_RV


def _penalise(logits_RV: Tensor, rows: Sequence[SampleRow], which: Sequence[int]) -> None:
    """Step 1, in place, for some of the rows."""
    places: list[tuple[int, int]] = []
    factors: list[float] = []
    offsets: list[float] = []
    for index in which:
        row, s = rows[index], rows[index].sampling
        output = Counter(row.output_token_ids)
        seen = set(output) if s.repetition_penalty == 1 else set(output) | set(row.prompt_token_ids)
        for token in seen:
            count = output[token]
            places.append((index, token))
            factors.append(s.repetition_penalty)
            offsets.append(s.presence_penalty * (count > 0) + s.frequency_penalty * count)
    if not places:
        return
    row_N, token_N = torch.tensor(places, device=logits_RV.device).unbind(1)
    factor_N = logits_RV.new_tensor(factors)
    value_N = logits_RV[row_N, token_N]
    value_N = torch.where(value_N > 0, value_N / factor_N, value_N * factor_N)
    logits_RV[row_N, token_N] = value_N - logits_RV.new_tensor(offsets)


def _draw(logits_RV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Steps 3 to 7: token ids [R]. In float64, where a rounding that differs between batches changes no token."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits_RV.device)[:, None]

    options = [row.sampling for row in rows]
    scaled_RV = logits_RV.double() / column([s.temperature for s in options])
    scaled_RV -= scaled_RV.amax(-1, keepdim=True)
    if any(s.top_k for s in options):
        _keep_top_k(scaled_RV, [s.top_k for s in options])
    weight_RV = scaled_RV.exp_()  # proportional to probability, the most likely token's is 1
    if any(s.top_p < 1 for s in options):
        _keep_top_p(weight_RV, [s.top_p for s in options])
    if any(s.min_p for s in options):
        weight_RV.masked_fill_(weight_RV < column([s.min_p for s in options]), 0)
    sum_RV = weight_RV.cumsum(-1)
    target_R1 = sum_RV[:, -1:] * column([row.uniform() for row in rows])  # below the last sum: u <= 1 - 2^-52
    token_R = torch.searchsorted(sum_RV, target_R1, right=True)[:, 0]
    return token_R.clamp_max(logits_RV.shape[1] - 1)  # past the end only where the model gave no numbers (NaN)


def _keep_top_k(scaled_RV: Tensor, top_k: Sequence[int]) -> None:
    """Step 4, in place: what is below the k-th greatest value becomes -inf. 0 keeps all."""
    vocabulary = scaled_RV.shape[1]
    rows = [index for index, k in enumerate(top_k) if 0 < k < vocabulary]
    if not rows:
        return
    some = torch.tensor(rows, device=scaled_RV.device)
    last_R = torch.tensor([top_k[index] - 1 for index in rows], device=scaled_RV.device)
    best_RK = scaled_RV[some].topk(max(top_k[index] for index in rows)).values
    least_R1 = best_RK.gather(1, last_R[:, None])
    scaled_RV[some] = scaled_RV[some].masked_fill(scaled_RV[some] < least_R1, -torch.inf)


def _keep_top_p(weight_RV: Tensor, top_p: Sequence[float]) -> None:
    """Step 5, in place: weights below that of the token at which the sum reaches p become 0."""
    wanted_R1 = weight_RV.new_tensor(top_p)[:, None] * weight_RV.sum(-1, keepdim=True)
    best_RK = weight_RV.topk(min(_NUCLEUS, weight_RV.shape[1])).values
    least_R1 = _least_kept(best_RK, wanted_R1)
    flat = [
        index
        for index, (sum_, wanted) in enumerate(zip(best_RK.sum(-1).tolist(), wanted_R1[:, 0].tolist(), strict=True))
        if sum_ < wanted
    ]
    if flat:  # a nucleus of more tokens than that
        some = torch.tensor(flat, device=weight_RV.device)
        sorted_RV = weight_RV[some].sort(-1, descending=True).values
        least_R1[some] = _least_kept(sorted_RV, wanted_R1[some])
    whole_R1 = torch.tensor([p >= 1 for p in top_p], device=weight_RV.device)[:, None]
    weight_RV.masked_fill_((weight_RV < least_R1) & ~whole_R1, 0)


def _least_kept(descending_RK: Tensor, wanted_R1: Tensor) -> Tensor:
    """The weight [R, 1] at which the sum of descending weights first reaches what is wanted (at the end: the last)."""
    place_R1 = torch.searchsorted(descending_RK.cumsum(-1), wanted_R1)
    return descending_RK.gather(1, place_R1.clamp_max(descending_RK.shape[1] - 1))


def _logprobs(logits_RV: Tensor, rows: Sequence[SampleRow], tokens: Sequence[int]) -> dict[int, Logprobs]:
    """Of the rows that ask for them."""
    asked = {index: row.sampling.logprobs for index, row in enumerate(rows) if row.sampling.logprobs is not None}
    if not asked:
        return {}
    some = torch.tensor(list(asked), device=logits_RV.device)
    logprob_RV = logits_RV[some].log_softmax(-1)
    chosen_R1 = torch.tensor([[tokens[index]] for index in asked], device=logits_RV.device)
    chosen = logprob_RV.gather(1, chosen_R1)[:, 0].tolist()
    best = logprob_RV.topk(min(max(asked.values()), logits_RV.shape[1]))
    values, ids = best.values.tolist(), best.indices.tolist()
    return {
        index: Logprobs(chosen[place], tuple(zip(ids[place][:count], values[place][:count], strict=True)))
        for place, (index, count) in enumerate(asked.items())
    }

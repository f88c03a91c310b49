"""Options at their bounds and logits of any size: what is drawn is what fp64 says, and always a choice."""

import math
import random
from itertools import product

import pytest
import torch

from isthmus.model.noise import gumbel
from isthmus.model.sampling import SampleRow, sample
from isthmus.proto.common_pb2 import SamplingParams
from isthmus.proto.sampling import Sampling

VOCABULARY = 12
EOS = frozenset({2})
LEAST, SMALL, HUGE = 2.0**-149, 1e-39, 3.4e38  # the least fp32, a subnormal one, nearly the greatest one
ROUNDING = 2.0**-20  # relative, of a few operations in fp32
VALUES = {
    "temperature": (0, LEAST, SMALL, 1e-30, 1e-7, 0.7, 1, 100),
    "top_p": (LEAST, SMALL, 1e-7, 0.5, 1 - 2**-24, 1),
    "top_k": (0, 1, 5, 2**32 - 1),
    "min_p": (0, LEAST, SMALL, 0.3, 1 - 2**-24, 1),
    "repetition_penalty": (LEAST, SMALL, 1e-20, 0.5, 1, 1, 10),
    "presence_penalty": (-2, 0, 0, LEAST, 2),
    "frequency_penalty": (-2, 0, 0, -SMALL, 2),
}
SCALES = (0.0, LEAST, SMALL, 1e-20, 1.0, 8.0, 1e4, 1e30, HUGE)


def make_row(rng: random.Random, **options: float) -> SampleRow:
    """Options as they come off the wire, which has fp32; a prompt and output of some tokens."""
    pb = SamplingParams(**options, seed=rng.getrandbits(64), min_tokens=rng.choice([0, 50]), max_tokens=60, logprobs=3)
    prompt, output = ([rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 6))] for _ in range(2))
    return SampleRow(Sampling.from_pb(pb), prompt, output, EOS)


def make_logits(rng: random.Random) -> list[float]:
    """Numbers of one size, or of many, with ties, and with tokens that cannot be."""
    scale = rng.choice(SCALES)
    values = [rng.uniform(-1, 1) * (scale if rng.random() < 0.9 else rng.choice(SCALES)) for _ in range(VOCABULARY)]
    if rng.random() < 0.3:
        values = [rng.choice(values[:3]) for _ in values]
    if rng.random() < 0.3:
        values = [value if index % 3 else -math.inf for index, value in enumerate(values)]
    return torch.tensor(values, dtype=torch.float32).tolist()


def adjusted(logits: list[float], row: SampleRow) -> list[float]:
    """Penalties and min_tokens by their definitions, in fp64."""
    s, out = row.sampling, list(row.output_token_ids)
    changed = []
    for token, value in enumerate(logits):
        if token in row.prompt_token_ids or token in out:
            value = value / s.repetition_penalty if value > 0 else value * s.repetition_penalty
        changed.append(value - (token in out) * s.presence_penalty - out.count(token) * s.frequency_penalty)
    open_to_it = [-math.inf if token in row.ruled_out else value for token, value in enumerate(changed)]
    return open_to_it if max(open_to_it) > -math.inf else changed


def kept(weights: list[float], s: Sampling, slack: float) -> set[int]:
    """Tokens that the limits keep, loosened by a positive `slack` and tightened by a negative one."""
    descending = sorted(weights, reverse=True)
    least = s.min_p * (1 - slack)
    if s.top_k:
        kth = descending[min(s.top_k, len(weights)) - 1]
        least, descending = max(least, kth * (1 - slack)), [w for w in descending if w >= kth]
    if s.top_p < 1:
        wanted, total, last = s.top_p * sum(descending) * (1 + slack), 0.0, 0.0
        for last in descending:
            total += last
            if total >= wanted:
                break
        least = max(least, last * (1 - slack))
    return {token for token, weight in enumerate(weights) if weight >= min(least, 1.0)}


def check(token: int, logits: list[float], row: SampleRow) -> None:
    values, s = adjusted(logits, row), row.sampling
    greatest = max(values)
    assert values[token] > -math.inf, "a token that cannot be"
    if s.temperature == 0:
        assert values[token] >= greatest - ROUNDING * abs(greatest) - 2 * LEAST
        return
    # Where fp32 is enough for the winner it is used, and its rounding is divided by the temperature.
    in_fp32 = abs(greatest) / s.temperature < 2**25
    rounding = (ROUNDING * abs(greatest) + 2 * LEAST) / s.temperature if in_fp32 else 0.0
    scaled = [(value - greatest) / s.temperature for value in values]
    weights = [math.exp(max(x, -700.0)) if x > -700 else 0.0 for x in scaled]
    numbers = gumbel([row.key], torch.arange(VOCABULARY)[None])[0].tolist()
    slack = 1e-5 + 4 * min(rounding, 100.0)
    assert token in kept(weights, s, slack)
    scores = [number + x for number, x in zip(numbers, scaled, strict=True)]
    sure = kept(weights, s, -slack) if slack < 0.1 else {token}
    assert scores[token] >= max(scores[other] for other in sure | {token}) - 1e-3 - 4 * rounding


@pytest.mark.parametrize("seed", range(8))
def test_any_options_and_logits_draw_what_fp64_says(seed: int) -> None:
    rng = random.Random(seed)
    rows = [make_row(rng, **{name: rng.choice(values) for name, values in VALUES.items()}) for _ in range(400)]
    logits = [make_logits(rng) for _ in rows]
    for row, values, drawn in zip(rows, logits, sample(torch.tensor(logits), rows), strict=True):
        check(drawn.token_id, values, row)
        assert drawn.logprobs is not None
        told = [drawn.logprobs.logprob, *(value for _, value in drawn.logprobs.top)]
        assert all(map(math.isfinite, told)), told


@pytest.mark.parametrize("temperature", [LEAST, 1e-45, SMALL, 1e-38, 1e-20])
def test_a_temperature_towards_0_is_greedy(temperature: float) -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(1)) * 5
    rows = [make_row(random.Random(seed), temperature=temperature) for seed in range(50)]
    rows = [SampleRow(row.sampling, [1], [3] * 60, EOS) for row in rows]
    assert [drawn.token_id for drawn in sample(logits, rows)] == logits.argmax(-1).tolist()
    tied = torch.zeros(50, 300)
    tied[:, [7, 80]] = 1
    assert {drawn.token_id for drawn in sample(tied, rows)} == {7, 80}, "tokens that tie are drawn from"


def test_a_repetition_penalty_towards_0_takes_the_likeliest_token_that_was_seen() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, -1.0]])
    for penalty, temperature in product((LEAST, SMALL, 1e-38), (0, 1, SMALL)):
        sampling = Sampling(repetition_penalty=penalty, temperature=temperature)
        assert sample(logits, [SampleRow(sampling, [1, 2], [3], frozenset())])[0].token_id == 2


def test_where_min_tokens_would_leave_no_token_it_is_left_out() -> None:
    row = SampleRow(Sampling(min_tokens=5), [0], [], frozenset({1}))
    logits = torch.tensor([[-torch.inf, 4.0, -torch.inf]])
    assert sample(logits, [row])[0].token_id == 1


def test_an_extreme_row_changes_none_beside_it() -> None:
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(1))
    rows = [SampleRow(Sampling(temperature=t, top_p=0.9), [1], [2], EOS) for t in (0.8, SMALL, 1.0)]
    alone = [sample(logits[index : index + 1], [row])[0] for index, row in enumerate(rows)]
    assert sample(logits, rows) == alone

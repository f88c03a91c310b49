"""Sampling: each option by its definition, and independence of the rows beside."""

import math
import random

import pytest
import torch
from torch import Tensor

from isthmus.model.noise import gumbel, place_key
from isthmus.model.penalties import SeenTokens
from isthmus.model.sampling import SampleRow, sample
from isthmus.proto.sampling import Sampling

EOS = frozenset({2})


def make_row(prompt: list[int] | None = None, output: list[int] | None = None, **options) -> SampleRow:
    return SampleRow(Sampling(**options).check(), prompt or [5], output or [], EOS)


def log(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


def draw(logits_1V: Tensor, count: int = 400, **options) -> list[int]:
    """How often each token comes at `count` positions."""
    counts = [0] * logits_1V.shape[1]
    rows = [make_row(output=[9] * place, **options) for place in range(count)]
    for token in sample(logits_1V.expand(count, -1), rows):
        counts[token.token_id] += 1
    return counts


def test_greedy_takes_the_most_likely_and_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 4.0, 0.0]])
    assert [t.token_id for t in sample(logits, [make_row(temperature=0)] * 2)] == [1, 0]


def splitmix(state: int, count: int) -> list[int]:
    outputs = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        outputs.append(z ^ (z >> 31))
    return outputs


def test_random_bits_are_what_splitmix64_makes() -> None:
    assert splitmix(1234567, 2) == [6457827717110365317, 3203168211198807973]  # a published test vector
    places = splitmix(splitmix(77, 1)[0], 3)
    assert [place_key(77, place) for place in range(3)] == places
    expected = [-math.log(-math.log1p(-((bits >> 32) + 0.5) / 2**32)) for bits in splitmix(places[2], 50)]
    (made,) = gumbel([places[2]], torch.arange(50)[None]).tolist()
    assert made == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_gumbel_numbers_have_their_distribution_and_do_not_repeat() -> None:
    keys = [place_key(seed, place) for seed in (0, 1, 2**64 - 1) for place in range(8)]
    numbers = gumbel(keys, torch.arange(5000)[None])
    assert bool(numbers.isfinite().all())
    for at in (-1.0, 0.0, 1.0, 3.0):
        assert abs((numbers < at).double().mean().item() - math.exp(-math.exp(-at))) < 0.005
    assert len(set(numbers[:, 7].tolist())) == len(keys)
    assert len({round(pair, 3) for pair in (numbers[0] - numbers[1]).tolist()}) > 2000
    some = torch.tensor([[4999, 0, 7]])
    assert torch.equal(gumbel(keys[3:4], some), numbers[3:4, some[0]])


def test_rounding_of_logits_hardly_ever_changes_a_draw() -> None:
    flat = torch.zeros(400, 20_000)  # where running sums over the vocabulary would turn 1 draw in 100
    noise = torch.randn(400, 20_000, generator=torch.Generator().manual_seed(1)) * 1e-6
    rows = [make_row(seed=seed) for seed in range(400)]
    assert [t.token_id for t in sample(flat, rows)] == [t.token_id for t in sample(flat + noise, rows)]


def test_draws_follow_the_distribution() -> None:
    counts = draw(log(0.5, 0.3, 0.2), 4000)
    assert [abs(count / 4000 - p) < 0.03 for count, p in zip(counts, (0.5, 0.3, 0.2), strict=True)] == [True] * 3


def test_temperature_sharpens_and_flattens() -> None:
    flat, sharp = draw(log(0.6, 0.4), 4000, temperature=4.0), draw(log(0.6, 0.4), 4000, temperature=0.25)
    assert abs(flat[0] / 4000 - 0.6**0.25 / (0.6**0.25 + 0.4**0.25)) < 0.03
    assert abs(sharp[0] / 4000 - 0.6**4 / (0.6**4 + 0.4**4)) < 0.03


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, {3}),
        ({"top_k": 2}, {3, 1, 4}),  # 1 and 4 are as likely: both stay
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.39}, {3}),
        ({"top_p": 0.41}, {3, 1, 4}),
        ({"top_p": 0.85}, {3, 1, 4, 2}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
        ({"min_p": 0.49}, {3, 1, 4}),
        ({"min_p": 0.51}, {3}),
        ({"top_k": 3, "top_p": 0.49}, {3}),  # 0.4 of the 0.8 that top_k leaves is half of it
        ({"top_k": 3, "top_p": 0.51}, {3, 1, 4}),
        ({"temperature": 0.01}, {3}),
    ],
)
def test_limits_keep_what_their_definition_says(options: dict, kept: set[int]) -> None:
    counts = draw(log(0.05, 0.2, 0.15, 0.4, 0.2), **options)
    assert {token for token, count in enumerate(counts) if count} == kept


def test_a_nucleus_wider_than_the_short_list_is_sorted_whole() -> None:
    logits = torch.zeros(1, 5000)
    logits[0, :100] = 1e-3
    counts = draw(logits, 3000, top_p=0.01)
    assert {token for token, count in enumerate(counts) if count} <= set(range(100))
    wide = draw(logits + torch.arange(5000) * -1e-6, 3000, top_p=0.5)
    assert 2000 < max(token for token, count in enumerate(wide) if count) < 2600


def test_penalties_change_the_logits_as_defined() -> None:
    logits = torch.tensor([[1.0, 0.9, -1.0, -1.1]])

    def greedy(prompt: list[int], output: list[int], **options: float) -> int:
        row = make_row(prompt, output, temperature=0, **options)
        return sample(logits, [row])[0].token_id

    assert greedy([0], [], repetition_penalty=1.2) == 1  # 1.0 / 1.2 < 0.9
    assert greedy([0], [], repetition_penalty=1.1) == 0
    assert greedy([0, 1], [], repetition_penalty=1.2) == 0  # both are lowered
    assert greedy([0], [], presence_penalty=0.2) == 0  # of the output only
    assert greedy([3], [0], presence_penalty=0.2) == 1
    assert greedy([3], [0], frequency_penalty=0.09) == 0
    assert greedy([3], [0, 0], frequency_penalty=0.09) == 1
    assert greedy([3], [1], presence_penalty=-0.2) == 1

    negative = torch.tensor([[-1.0, -1.1]])
    row = make_row([0], [], temperature=0, repetition_penalty=1.2)
    assert sample(negative, [row])[0].token_id == 1  # -1.0 * 1.2 < -1.1


def adjusted(logits: list[float], row: SampleRow) -> list[float]:
    """Penalties by their definition, token by token."""
    s, out = row.sampling, list(row.output_token_ids)
    changed = []
    for token, value in enumerate(logits):
        if token in row.prompt_token_ids or token in out:
            value = value / s.repetition_penalty if value > 0 else value * s.repetition_penalty
        changed.append(value - (token in out) * s.presence_penalty - out.count(token) * s.frequency_penalty)
    return changed


def test_penalties_of_a_mixed_batch_are_counted_as_it_goes() -> None:
    rng, vocabulary, longest = random.Random(8), 200, 0
    kinds: list[dict[str, float]] = [{}, {"repetition_penalty": 1.5}, {"presence_penalty": 0.7}]
    kinds += [{"frequency_penalty": 0.4, "repetition_penalty": 0.8}, {"frequency_penalty": -0.3}]
    running: list[tuple[SampleRow, list[int]]] = []
    for step in range(120):
        if len(running) < 6 and step % 2:  # requests join with output of a lost worker, and leave
            sampling = Sampling(temperature=0, **kinds[step // 2 % len(kinds)])
            prompt = [rng.randrange(vocabulary) for _ in range(rng.randrange(1, 9))]
            output = [rng.randrange(vocabulary) for _ in range(rng.randrange(4))]
            running.append((SampleRow(sampling, prompt, output, EOS, SeenTokens(sampling, prompt)), output))
        running = [one for one in running if rng.random() > 0.005]
        rng.shuffle(running)
        if not running:
            continue
        logits = torch.randn(len(running), vocabulary, generator=torch.Generator().manual_seed(step))
        rows = [row for row, _ in running]
        together = [token.token_id for token in sample(logits, rows)]
        wanted = [adjusted(logits_V, row) for logits_V, row in zip(logits.tolist(), rows, strict=True)]
        assert together == [max(range(vocabulary), key=values.__getitem__) for values in wanted]
        anew = [SampleRow(row.sampling, row.prompt_token_ids, row.output_token_ids, EOS) for row in rows]
        assert together == [sample(logits[n : n + 1], [row])[0].token_id for n, row in enumerate(anew)]
        for (_, output), token in zip(running, together, strict=True):
            output.append(token)
        longest = max(longest, *(len(set(output)) for _, output in running))
    assert longest > 64, "more than what is first made room for"


def test_nothing_ends_the_output_before_min_tokens() -> None:
    logits = torch.tensor([[1.0, 2.0, 9.0, 8.0, 0.0]])

    def greedy(output: list[int], **options) -> int:
        return sample(logits, [make_row(output=output, temperature=0, **options)])[0].token_id

    assert greedy([], max_tokens=9) == 2
    assert greedy([4], min_tokens=2, max_tokens=9) == 3
    assert greedy([4], min_tokens=2, max_tokens=9, stop_token_ids=frozenset({3, 99})) == 1
    assert greedy([4], min_tokens=2, max_tokens=9, ignore_eos=True) == 2
    assert greedy([4, 4], min_tokens=2, max_tokens=9) == 2


def test_log_probabilities_are_the_models_own() -> None:
    logits = log(0.5, 0.3, 0.2) + 3
    options = {"temperature": 0, "repetition_penalty": 5.0, "max_tokens": 9, "logprobs": 2}
    (token,) = sample(logits, [make_row([0], [1], **options)])
    assert token.token_id == 2
    assert token.logprobs is not None
    assert math.isclose(token.logprobs.logprob, math.log(0.2), rel_tol=1e-5)
    assert [index for index, _ in token.logprobs.top] == [0, 1]
    assert math.isclose(token.logprobs.top[1][1], math.log(0.3), rel_tol=1e-5)
    message = token.logprobs_pb()
    assert message is not None
    assert [top.token_id for top in message.top] == [0, 1]

    (alone,) = sample(logits, [make_row(temperature=0, logprobs=0)])
    assert alone.logprobs is not None
    assert alone.logprobs.top == ()
    assert sample(logits, [make_row(temperature=0)])[0].logprobs_pb() is None


def test_logits_are_left_as_they_are() -> None:
    logits = torch.randn(3, 50)
    before = logits.clone()
    row = make_row([1, 2], [3], repetition_penalty=2.0, top_k=5, top_p=0.5, min_tokens=4, seed=1)
    sample(logits, [row] * 3)
    assert torch.equal(logits, before)


def random_options(rng: random.Random) -> dict:
    return {
        "temperature": rng.choice([0, 0.3, 1.0, 2.5]),
        "top_k": rng.choice([0, 0, 3, 50]),
        "top_p": rng.choice([1.0, 0.3, 0.95]),
        "min_p": rng.choice([0.0, 0.0, 0.05]),
        "repetition_penalty": rng.choice([1.0, 1.0, 1.3]),
        "presence_penalty": rng.choice([0.0, 0.5]),
        "frequency_penalty": rng.choice([0.0, -0.5]),
        "min_tokens": rng.choice([0, 100]),
        "logprobs": rng.choice([None, 0, 5]),
        "seed": rng.getrandbits(64),
    }


@pytest.mark.parametrize("bf16", [False, True])  # logits of a bf16 head have many equal values
def test_a_row_draws_the_same_alone_and_in_any_batch(bf16: bool) -> None:
    rng = random.Random(3)
    logits = torch.randn(24, 3001, generator=torch.Generator().manual_seed(0)) * 3
    logits = logits.bfloat16().float() if bf16 else logits
    rows = [
        make_row([rng.randrange(3001) for _ in range(9)], [rng.randrange(3001) for _ in range(rng.randrange(9))], **o)
        for o in (random_options(rng) for _ in range(24))
    ]
    alone = [sample(logits[index : index + 1], [row])[0] for index, row in enumerate(rows)]
    assert len({token.token_id for token in alone}) > 12
    for _ in range(5):
        order = rng.sample(range(24), rng.randrange(2, 25))
        together = sample(logits[order], [rows[index] for index in order])
        assert [t.token_id for t in together] == [alone[index].token_id for index in order]
        assert [t.logprobs is None for t in together] == [alone[index].logprobs is None for index in order]


def test_a_replay_draws_the_same_wherever_the_prompt_ends() -> None:
    logits = torch.randn(1, 500)
    whole = make_row([1, 2, 3], [4, 5], seed=9)
    replayed = make_row([1, 2, 3, 4], [5], seed=9)
    assert sample(logits, [whole]) == sample(logits, [replayed])


def test_a_bias_comes_after_penalties_and_before_what_is_ruled_out() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, -4.0], [0.0, 0.0, 9.0, 8.5]])
    rows = [
        make_row(output=[1], temperature=0, repetition_penalty=2.0, logit_bias=((1, 1.5), (3, 6.9))),
        make_row(temperature=0, min_tokens=1, logit_bias=((0, 1.0), (2, 100.0), (3, -9.0))),
    ]
    assert [t.token_id for t in sample(logits, rows)] == [2, 0]  # 2 / 2 + 1.5 < 3; the end is not drawn for a bias
    rows[0] = make_row(output=[1], temperature=0, repetition_penalty=2.0, logit_bias=((1, 2.1), (3, 6.9)))
    assert [t.token_id for t in sample(logits, rows)] == [1, 0]
    assert torch.equal(logits[0], torch.tensor([1.0, 2.0, 3.0, -4.0]))


def test_biased_draws_follow_the_biased_distribution_and_rows_beside_do_not_change() -> None:
    logits = log(0.5, 0.3, 0.2).expand(4000, -1)
    shift = math.log(0.2 / 0.5)
    rows = [make_row(output=[9] * place, logit_bias=((0, shift), (2, -100.0))) for place in range(4000)]
    plain = [make_row(output=[9] * place) for place in range(4000)]
    mixed = [row for pair in zip(rows, plain, strict=True) for row in pair]
    drawn = [t.token_id for t in sample(logits.repeat_interleave(2, 0), mixed)]
    assert drawn[1::2] == [t.token_id for t in sample(logits, plain)]
    assert drawn[::2].count(0) / 4000 == pytest.approx(0.2 / 0.5, abs=0.03)
    assert 2 not in drawn[::2]


def test_log_probabilities_are_those_without_a_bias() -> None:
    (token,) = sample(log(0.5, 0.3, 0.2), [make_row(temperature=0, logprobs=1, logit_bias=((2, 50.0),))])
    assert token.token_id == 2 and token.logprobs is not None
    assert token.logprobs.logprob == pytest.approx(math.log(0.2), rel=1e-5)
    assert token.logprobs.top[0][0] == 0

"""What is kept of a prompt for the other answers to it: who gets it, and how much is kept at most."""

from dataclasses import replace

import torch

from isthmus.decode.pool.forks import Fork, Forks
from isthmus.model.sampling import SampledToken
from isthmus.proto.sampling import MAX_SEED, Sampling, fork_sampling

FIRST = Sampling(seed=MAX_SEED, temperature=0.5, prompt_logprobs=3, n=3)


def fork(*drawn: int, tokens: int = 10) -> Fork:
    raw = (torch.zeros(tokens, 2, 4), torch.zeros(tokens, 2, 4))
    tokens_drawn = tuple(map(SampledToken, drawn))
    return Fork(prompt=(1, 2), sampling=FIRST, codec="raw", start=0, raw=(raw,), drawn=tokens_drawn)


def test_each_answer_has_the_token_of_its_own_seed() -> None:
    kept = fork(7, 8)
    second, third = (fork_sampling(FIRST, number) for number in (1, 2))
    assert (second.seed, third.seed, second.prompt_logprobs) == (0, 1, None)
    assert [kept.first_token(sampling) for sampling in (second, third)] == [SampledToken(7), SampledToken(8)]
    for other in (FIRST, fork_sampling(FIRST, 3), replace(second, temperature=0.6), replace(second, max_tokens=9)):
        assert kept.first_token(other) is None


def test_what_all_have_taken_is_not_kept() -> None:
    forks, kept = Forks(), fork(7, 8)
    forks.add("a", kept)
    assert forks.nbytes == kept.nbytes == 10 * 2 * 4 * 4 * 2
    assert [forks.take("b"), forks.take("a"), forks.take("a"), forks.take("a")] == [None, kept, kept, None]
    assert forks.nbytes == 0


def test_the_oldest_make_room_and_what_is_too_large_is_not_kept() -> None:
    size = fork(7).nbytes
    forks = Forks(2 * size)
    for name in "abc":
        forks.add(name, fork(7))
    assert (forks.nbytes, forks.take("a")) == (2 * size, None)
    forks.add("large", fork(7, tokens=30))
    forks.add("nobody follows", fork())
    assert [forks.take(name) is not None for name in ("b", "c", "large", "nobody follows")] == [
        True,
        True,
        False,
        False,
    ]

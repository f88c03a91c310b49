"""Sampling and stopping options with their defaults and limits: `SamplingParams` of the wire, checked."""

import math
from array import array
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

from .common_pb2 import SamplingParams
from .errors import InvalidRequest

MAX_SEED = (1 << 64) - 1
MAX_STOPS, MAX_STOP_IDS = 16, 256
MAX_CHOICES = 64
MAX_BIASES, MAX_BIAS = 1024, 100.0
MAX_LOGPROBS = 20  # the most likely tokens that are reported


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one request draws its tokens and when it ends. `check` says what is allowed."""

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # of tokens in prompt and output (Keskar et al., CTRL, section 4.1)
    presence_penalty: float = 0.0  # of tokens in the output, once
    frequency_penalty: float = 0.0  # of tokens in the output, times their count
    seed: int = 0
    max_tokens: int = 256
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None  # how many top log-probabilities to report
    n: int = 1  # answers to the prompt; each has sampling of its own, with a seed of its own, and the same n
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit), each token once
    prompt_logprobs: int | None = None  # the same as `logprobs` of the prompt's own tokens

    def check(self) -> Self:
        """Returns itself; InvalidRequest where a value is out of its range."""
        _in_range("temperature", self.temperature, 0, 100)
        _in_range("top_p", self.top_p, 0, 1, above_low=True)
        _in_range("min_p", self.min_p, 0, 1)
        _in_range("repetition_penalty", self.repetition_penalty, 0, 10, above_low=True)
        _in_range("presence_penalty", self.presence_penalty, -2, 2)
        _in_range("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.max_tokens < 1:
            raise InvalidRequest("max_tokens is 0; allowed: 1 or more")
        if self.min_tokens > self.max_tokens:
            raise InvalidRequest(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        _check_count("stop strings", len(self.stop), MAX_STOPS)
        for stop in self.stop:
            if not 1 <= len(stop) <= 256:
                raise InvalidRequest(f"a stop string of {len(stop)} characters; allowed: 1 to 256")
        _check_count("stop token ids", len(self.stop_token_ids), MAX_STOP_IDS)
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None and count > MAX_LOGPROBS:
                raise InvalidRequest(f"{name} is {count}; allowed: at most {MAX_LOGPROBS}")
        if not 1 <= self.n <= MAX_CHOICES:
            raise InvalidRequest(f"n is {self.n}; allowed: 1 to {MAX_CHOICES}")
        _check_count("tokens in logit_bias", len(self.logit_bias), MAX_BIASES)
        for token, bias in self.logit_bias:
            _in_range(f"logit_bias of token {token}", bias, -MAX_BIAS, MAX_BIAS)
        return self

    def check_vocabulary(self, vocab_size: int) -> Self:
        """Returns itself; InvalidRequest where it names a token that the model does not have."""
        check_token_ids("stop_token_ids", sorted(self.stop_token_ids), vocab_size)
        check_token_ids("logit_bias", [token for token, _ in self.logit_bias], vocab_size)
        return self

    @cached_property
    def bias_arrays(self) -> tuple["array[int]", "array[float]"]:
        """The tokens of `logit_bias` (int64) and what is added to their logits (float32), made once for all steps."""
        return array("q", [token for token, _ in self.logit_bias]), array("f", [bias for _, bias in self.logit_bias])

    @classmethod
    def from_pb(cls, pb: SamplingParams) -> Self:
        """The options of a message with defaults for what is not set; InvalidRequest where out of range."""
        # Before they are copied, and before equal ones become one: a message has room for millions.
        _check_count("stop strings", len(pb.stop), MAX_STOPS)
        _check_count("stop token ids", len(pb.stop_token_ids), MAX_STOP_IDS)
        _check_count("tokens in logit_bias", len(pb.logit_bias), MAX_BIASES)
        scalars = {
            name: getattr(pb, name)
            for name in _SCALARS
            if pb.HasField(name)  # pyright: ignore[reportArgumentType]  # the rest keep their defaults
        }
        return cls(
            **scalars,
            stop=tuple(pb.stop),
            stop_token_ids=frozenset(pb.stop_token_ids),
            ignore_eos=pb.ignore_eos,
            logit_bias=tuple(sorted(pb.logit_bias.items())),
        ).check()

    def to_pb(self) -> SamplingParams:
        """The message with every field set, so that the next hop needs no defaults."""
        return SamplingParams(
            **{name: value for name in _SCALARS if (value := getattr(self, name)) is not None},
            stop=self.stop,
            stop_token_ids=sorted(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logit_bias=dict(self.logit_bias),
        )


_SCALARS = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "seed", "max_tokens", "min_tokens", "logprobs"),
    *("n", "prompt_logprobs"),
)


def checked_forks(forks: int) -> int:
    """The same; InvalidRequest where more answers follow a first one than a request may have."""
    if forks >= MAX_CHOICES:
        raise InvalidRequest(f"forks is {forks}; allowed: at most {MAX_CHOICES - 1}")
    return forks


def fork_sampling(sampling: Sampling, number: int) -> Sampling:
    """Of an answer that follows the first one to the same prompt, by its number, from 1 on."""
    return replace(sampling, seed=(sampling.seed + number) & MAX_SEED, prompt_logprobs=None)


def check_token_ids(what: str, ids: Collection[int], vocab_size: int) -> None:
    """InvalidRequest where a token id is out of the vocabulary."""
    bad = next((token for token in ids if token >= vocab_size), None)
    if bad is not None:
        raise InvalidRequest(f"{what} has token id {bad}; allowed: 0 to {vocab_size - 1}")


def _check_count(what: str, count: int, most: int) -> None:
    if count > most:
        raise InvalidRequest(f"{count} {what}; allowed: at most {most}")


def _in_range(name: str, value: float, low: float, high: float, *, above_low: bool = False) -> None:
    if not math.isfinite(value) or not low <= value <= high or (above_low and value == low):
        opening = "(" if above_low else "["
        raise InvalidRequest(f"{name} is {value:g}; allowed: {opening}{low:g}, {high:g}]")

"""Sampling and stopping options with their defaults and limits: `SamplingParams` of the wire, checked."""

import math
from dataclasses import dataclass
from typing import Self

from .common_pb2 import SamplingParams
from .errors import InvalidRequest
from .grammar import Grammar

MAX_SEED = (1 << 64) - 1
MAX_STOPS, MAX_STOP_IDS = 16, 256


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
    grammar: Grammar | None = None  # what the output must be

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
        if len(self.stop) > MAX_STOPS:
            raise InvalidRequest(f"{len(self.stop)} stop strings; allowed: at most {MAX_STOPS}")
        for stop in self.stop:
            if not 1 <= len(stop) <= 256:
                raise InvalidRequest(f"a stop string of {len(stop)} characters; allowed: 1 to 256")
        if len(self.stop_token_ids) > MAX_STOP_IDS:
            raise InvalidRequest(f"{len(self.stop_token_ids)} stop token ids; allowed: at most {MAX_STOP_IDS}")
        if self.logprobs is not None and self.logprobs > 20:
            raise InvalidRequest(f"logprobs is {self.logprobs}; allowed: at most 20")
        if self.grammar is not None:
            self.grammar.check()
        return self

    @classmethod
    def from_pb(cls, pb: SamplingParams) -> Self:
        """The options of a message with defaults for what is not set; InvalidRequest where out of range."""
        if pb.HasField("n") and pb.n != 1:
            raise InvalidRequest(f"n is {pb.n}; allowed: 1")
        # Before they are copied, and before equal ones become one: a message has room for millions.
        for name, count, most in (
            ("stop strings", len(pb.stop), MAX_STOPS),
            ("stop token ids", len(pb.stop_token_ids), MAX_STOP_IDS),
        ):
            if count > most:
                raise InvalidRequest(f"{count} {name}; allowed: at most {most}")
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
            grammar=Grammar.from_pb(pb.grammar) if pb.HasField("grammar") else None,
        ).check()

    def to_pb(self) -> SamplingParams:
        """The message with every field set, so that the next hop needs no defaults."""
        return SamplingParams(
            **{name: value for name in _SCALARS if (value := getattr(self, name)) is not None},
            stop=self.stop,
            stop_token_ids=sorted(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            grammar=self.grammar.to_pb() if self.grammar is not None else None,
        )


_SCALARS = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "seed", "max_tokens", "min_tokens", "logprobs"),
)


def _in_range(name: str, value: float, low: float, high: float, *, above_low: bool = False) -> None:
    if not math.isfinite(value) or not low <= value <= high or (above_low and value == low):
        opening = "(" if above_low else "["
        raise InvalidRequest(f"{name} is {value:g}; allowed: {opening}{low:g}, {high:g}]")

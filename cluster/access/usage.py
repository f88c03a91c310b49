"""How much each caller has used of its limits. Pure: the time comes in as an argument, in seconds of one clock.

A bucket of tokens holds what may be used at once, a minute's worth, and is filled evenly. A request's tokens are taken
when it begins, prompt and the most that it may put out; what it did not use is given back at its end.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

from ...proto.errors import Exhausted, InvalidRequest
from .settings import Limits

MAX_ACCOUNTS = 100_000  # that are remembered, those used last
MINUTE_S = 60.0
_LOOKS = 4  # for one that is idle, each time that one is added
_ROUNDING = 1e-6  # of what floating point makes of amounts


class OverLimit(Exhausted):
    """A limit of the caller's own is reached; `reason` names it as the settings do."""

    def __init__(self, reason: str, text: str, retry_after_s: float | None) -> None:
        super().__init__(text)
        self.reason, self.retry_after_s = reason, retry_after_s


@dataclass
class Bucket:
    """Holds at most `size`, and is filled in a minute."""

    size: float
    filled_s: float  # when `level` was right
    level: float = math.nan

    def __post_init__(self) -> None:
        self.level = self.size

    def resize(self, size: float, now_s: float) -> None:
        """The limit is another one from now on."""
        self._fill(now_s)
        self.size, self.level = size, min(self.level, size)

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until there is so much, if nobody else takes any; 0 where it is there. At most `size` ever is."""
        self._fill(now_s)
        missing = min(amount, self.size) - self.level
        return missing * MINUTE_S / self.size if missing > _ROUNDING else 0.0

    def take(self, amount: float, now_s: float) -> None:
        """Takes what there is, no more than `size`; below nothing it never goes."""
        self._fill(now_s)
        self.level = max(0.0, self.level - amount)

    def give_back(self, amount: float, now_s: float) -> None:
        """Puts back what was not used."""
        self._fill(now_s)
        self.level = min(self.size, self.level + amount)

    def is_full(self, now_s: float) -> bool:
        """Whether it is as good as new."""
        self._fill(now_s)
        return self.level >= self.size

    def _fill(self, now_s: float) -> None:
        passed_s = max(0.0, now_s - self.filled_s)  # a clock may stand still, but not turn back what was taken
        self.level = min(self.size, self.level + passed_s * self.size / MINUTE_S)
        self.filled_s = max(self.filled_s, now_s)


class Allowance(NamedTuple):
    """What is left of a limit for a minute."""

    limit: int
    remaining: float
    reset_s: float  # until all of it is there again, if nothing more is used


@dataclass
class Account:
    """What one key, or one tenant, uses."""

    requests: Bucket | None = None
    tokens: Bucket | None = None
    running: int = 0

    def fit(self, limits: Limits, now_s: float) -> None:
        """Makes its buckets those of these limits."""
        self.requests = _fitted(self.requests, limits.requests_per_min, now_s)
        self.tokens = _fitted(self.tokens, limits.tokens_per_min, now_s)

    def left(self, now_s: float) -> dict[str, Allowance]:
        """What is left, by what is counted; nothing of what has no limit."""
        found: dict[str, Allowance] = {}
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                reset_s = bucket.wait_s(bucket.size, now_s)
                found[name] = Allowance(round(bucket.size), bucket.level, reset_s)
        return found

    def is_idle(self, now_s: float) -> bool:
        """Whether a new one in its place would be no other."""
        return not self.running and all(
            bucket is None or bucket.is_full(now_s) for bucket in (self.requests, self.tokens)
        )


def _fitted(bucket: Bucket | None, size: int | None, now_s: float) -> Bucket | None:
    if size is None:
        return None
    if bucket is None:
        return Bucket(size, now_s)
    if bucket.size != size:
        bucket.resize(size, now_s)
    return bucket


@dataclass
class Permit:
    """One request that has begun. `close` at its end, once."""

    account: Account
    reserved: int = 0  # tokens taken for it
    prompt_tokens: int = 0
    output_tokens: int = 0  # so far; whoever passes tokens on counts them here

    def reserve(self, prompt_tokens: int, most_output: int, now_s: float) -> None:
        """Takes its tokens. OverLimit, with the time to wait, where there are not so many now; InvalidRequest where
        there never are."""
        bucket, tokens = self.account.tokens, prompt_tokens + most_output
        if bucket is not None:
            if tokens > bucket.size:
                raise InvalidRequest(
                    f"prompt and output come to {tokens} tokens; allowed for you: {bucket.size:.0f} a minute"
                )
            if wait_s := bucket.wait_s(tokens, now_s):
                raise OverLimit(
                    "tokens_per_min", f"more than {bucket.size:.0f} tokens a minute: try again later", wait_s
                )
            bucket.take(tokens, now_s)
        self.reserved, self.prompt_tokens = tokens, prompt_tokens

    def close(self, now_s: float, *, refused: bool) -> None:
        """The request has ended, or is `refused`: then it has used nothing, unless it has put out something."""
        self.account.running -= 1
        used = 0 if refused and not self.output_tokens else self.prompt_tokens + self.output_tokens
        if self.account.tokens is not None:
            self.account.tokens.give_back(max(0, self.reserved - used), now_s)


@dataclass
class Accounts:
    """The accounts of all callers, those that are idle forgotten when there are many."""

    most: int = MAX_ACCOUNTS
    _accounts: OrderedDict[str, Account] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._accounts)

    def enter(self, name: str, limits: Limits, now_s: float) -> Permit:
        """A request begins. OverLimit where there are too many at once, or in this minute."""
        if (limits.requests_per_min, limits.tokens_per_min, limits.running) == (None, None, None):
            return Permit(Account(running=1))  # nothing to remember
        account = self._account(name, limits, now_s)
        if limits.running is not None and account.running >= limits.running:
            raise OverLimit(
                "running", f"{account.running} of your requests run already; allowed: {limits.running}", None
            )
        if account.requests is not None:
            if wait_s := account.requests.wait_s(1, now_s):
                text = f"more than {account.requests.size:.0f} requests a minute: try again later"
                raise OverLimit("requests_per_min", text, wait_s)
            account.requests.take(1, now_s)
        account.running += 1
        return Permit(account)

    def left(self, name: str, limits: Limits, now_s: float) -> dict[str, Allowance]:
        """What is left to an account."""
        if (limits.requests_per_min, limits.tokens_per_min) == (None, None):
            return {}
        return self._account(name, limits, now_s).left(now_s)

    def _account(self, name: str, limits: Limits, now_s: float) -> Account:
        account = self._accounts.setdefault(name, Account())
        self._accounts.move_to_end(name)
        account.fit(limits, now_s)
        for _ in range(_LOOKS):
            if len(self._accounts) <= self.most:
                break
            oldest, idle = next(iter(self._accounts.items()))
            if idle.is_idle(now_s):
                del self._accounts[oldest]
            else:
                self._accounts.move_to_end(oldest)
        return account


def reserve_for_job(permit: Permit, prompt_tokens: int, most_output: int, now_s: float) -> float:
    """Takes the tokens of a request of a job, or says how long it has to wait for them. One that is larger than a
    minute's worth, since the limit was made smaller, waits for all of it."""
    bucket, tokens = permit.account.tokens, prompt_tokens + most_output
    if bucket is not None:
        if wait_s := bucket.wait_s(tokens, now_s):
            return wait_s
        bucket.take(tokens, now_s)
        tokens = min(tokens, round(bucket.size))
    permit.reserved, permit.prompt_tokens = tokens, prompt_tokens
    return 0.0

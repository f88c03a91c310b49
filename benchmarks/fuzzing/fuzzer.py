"""Sends inputs to a fleet, with a good request after each."""

import asyncio
import random
import time
from typing import Any

import grpc
import grpc.aio

from isthmus.cluster.client.client import build_request
from isthmus.kvtransfer.frame import PROTOCOL_VERSION
from isthmus.kvtransfer.hashing import page_hashes, page_salt
from isthmus.proto.decode_pb2 import DecodeRequest
from isthmus.proto.decode_pb2_grpc import DecodeStub
from isthmus.proto.generation_pb2 import GenerateRequest
from isthmus.proto.generation_pb2_grpc import GenerationStub
from isthmus.proto.sampling import Sampling

from .calls import call
from .certificates import call_as
from .files import Parsers
from .fleet import Fleet
from .frames import ALL, REFUSING, UNDETECTABLE, LyingPrefill
from .inputs import Input, Outcome
from .sockets import send

AT_ONCE = 8
GOOD_PROMPTS, GOOD_TOKENS = 6, 8
GOOD_LIMIT_S = 60.0
SHARES = {"rpc": 42, "http2": 24, "raw": 6, "frames": 12, "file": 10, "certificate": 6}
VOCAB = 500  # of tokens that prompts are drawn from


class Fuzzer:
    """Sends inputs to a fleet, each drawn from the seed and its own number, with a good request after each."""

    def __init__(self, fleet: Fleet, outcome: Outcome, parsers: Parsers, liar: LyingPrefill) -> None:
        self._fleet, self._outcome, self._parsers, self._liar = fleet, outcome, parsers, liar
        self._good = [_good_request(number) for number in range(GOOD_PROMPTS)]
        self._expected: list[list[int]] = []
        self._lying, self._pages_of_frames = asyncio.Lock(), 0

    async def learn(self) -> None:
        """The right tokens of the good requests."""
        for request in self._good:
            self._expected.append([token async for event in self._ask(request) for token in event.token_ids])
        assert all(len(tokens) == GOOD_TOKENS for tokens in self._expected)

    async def run(self, until_s: float, kinds: dict[str, int]) -> None:
        """Inputs until then, AT_ONCE at a time."""
        numbers = iter(range(1 << 60))

        async def sender() -> None:
            while time.monotonic() < until_s:
                number = next(numbers)
                await self._one(number, random.Random(f"{self._outcome.seed}:{number}"), kinds)
                await self.good(number)

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(sender())

    async def _one(self, number: int, rng: random.Random, kinds: dict[str, int]) -> None:
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        busy = {"file": self._parsers.lock.locked(), "frames": self._lying.locked()}
        if busy.get(kind):
            kind = "rpc"
        if kind == "file":
            async with self._parsers.lock:
                await self._parsers.read(number, rng)
        elif kind == "frames":
            async with self._lying:
                await self._lie(number, rng)
        elif kind == "rpc":
            await call(self._fleet, self._outcome, number, rng)
        elif kind == "certificate":
            await call_as(self._fleet.doors, self._fleet, self._outcome, number, rng)
        else:
            await send(self._fleet, self._outcome, number, rng, kind)

    async def good(self, number: int) -> None:
        """A request of somebody who means well."""
        which = number % GOOD_PROMPTS
        self._outcome.good["asked"] += 1
        tokens: list[int] = []
        try:
            async for event in self._ask(self._good[which]):
                tokens += event.token_ids
        except grpc.aio.AioRpcError as error:
            self._outcome.good[error.code().name] += 1
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                self._outcome.hung(f"a good request had no answer after {GOOD_LIMIT_S:g} s", "good")
            else:
                self._outcome.failed(f"a good request: {error.code().name}: {error.details()}")
            return
        self._outcome.good["answered"] += 1
        self._compare(tokens, self._expected[which], "a good request")

    def _compare(self, tokens: list[int], expected: list[int], what: str, made: Input | None = None) -> None:
        wrong = sum(a != b for a, b in zip(tokens, expected, strict=False)) + abs(len(tokens) - len(expected))
        if wrong:
            self._outcome.wrong_tokens += wrong
            self._outcome.failed(f"{what} got {tokens} instead of {expected}", made)

    def _ask(self, request: GenerateRequest) -> Any:
        return GenerationStub(self._fleet.channel(self._fleet.main.gateway.address)).Generate(
            request, timeout=GOOD_LIMIT_S, wait_for_ready=True
        )

    async def lie_again(self, number: int) -> None:
        """The same lie as in the run of the same seed."""
        rng = random.Random(f"{self._outcome.seed}:{number}")
        rng.random()  # by which the kind was drawn
        await self._lie(number, rng)

    async def _lie(self, number: int, rng: random.Random) -> None:
        """A request to the decode worker whose first prefill worker lies, and whose second does not."""
        liar, which, lie = self._liar, rng.randrange(GOOD_PROMPTS), rng.choice(ALL)
        liar.lie_as(lie, rng)
        made = Input(kind="frames", target="decode-0", what=lie, number=number)
        self._outcome.sent(made)
        prefill, decode = (self._fleet.main.of(role)[0] for role in ("prefill", "decode"))
        report = self._fleet.reports[decode.name]
        prompt, codec = list(self._good[which].tokens.ids), "raw"
        tenant = f"frames-{number}"  # a new one: nothing is held of it, and all pages are sent
        salt = page_salt(report.model.fingerprint, codec, report.codecs[codec], tenant)
        request = DecodeRequest(
            protocol_version=PROTOCOL_VERSION,
            request_id=f"frames-{number}",
            model_fingerprint=report.model.fingerprint,
            codec=codec,
            prompt_token_ids=prompt,
            page_hashes=page_hashes(prompt, report.page_tokens, salt),
            sampling=Sampling(temperature=0, max_tokens=GOOD_TOKENS, ignore_eos=True).to_pb(),
            prefill_addresses=[liar.address, prefill.address],
            tenant=tenant,
        )
        tokens: list[int] = []
        starts, begun_s = decode.starts, time.monotonic()
        stub: Any = DecodeStub(self._fleet.channel(decode.address))
        try:
            async for event in stub.Generate(request, timeout=GOOD_LIMIT_S):
                tokens += event.token_ids
        except grpc.aio.AioRpcError as error:
            if time.monotonic() - begun_s >= GOOD_LIMIT_S:
                self._outcome.hung(f"a decode worker gave no answer to pages that lie: {lie}", "decode")
            elif lie != REFUSING and decode.starts == starts and decode.alive:
                self._outcome.failed(f"pages that lie ({lie}): {error.code().name}: {error.details()}", made)
            return
        if lie != UNDETECTABLE:
            self._compare(tokens, self._expected[which], f"a request whose prefill worker lies ({lie})", made)


def _good_request(number: int) -> GenerateRequest:
    rng = random.Random(f"good {number}")
    prompt = [rng.randrange(3, VOCAB) for _ in range(rng.randint(20, 200))]
    sampling = {"temperature": 0, "max_tokens": GOOD_TOKENS, "ignore_eos": True}
    return build_request(token_ids=prompt, codec="raw", sampling=sampling)

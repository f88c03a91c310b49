"""Whether grammars can be compiled, found out in a process apart (`model/grammar/trial.py`), which may die of one."""

import asyncio
import json
import select
import subprocess
import sys
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b

from ...proto.errors import Exhausted, InvalidRequest, Unavailable
from ...proto.grammar import Grammar

ANSWER_S = 5.0  # that the process may take, its start included, on a machine with much else to do
MAX_WAITING = 32
KEPT = 512  # answers


_thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")


class GrammarTrials:
    """Of one gateway. The process is started with the first grammar, and anew where it has gone."""

    def __init__(self, special_tokens: Mapping[int, str], end_ids: frozenset[int]) -> None:
        self._about = json.dumps({"special": special_tokens, "ends": sorted(end_ids)})
        self._waiting = 0
        self._process: subprocess.Popen[str] | None = None
        self._end_process = lambda: None
        self._known: OrderedDict[bytes, str | None] = OrderedDict()  # what is wrong, by a digest of the grammar

    async def check(self, grammar: Grammar) -> None:
        """InvalidRequest where a grammar cannot be compiled, or takes too much; Exhausted where too many wait."""
        line = json.dumps({"kind": grammar.kind, "text": grammar.text, "choices": grammar.choices})
        digest = blake2b(line.encode(), digest_size=32).digest()
        if digest not in self._known:
            if self._waiting >= MAX_WAITING:
                raise Exhausted(f"{self._waiting} grammars wait to be compiled")
            self._waiting += 1
            try:
                reason = await asyncio.get_running_loop().run_in_executor(_thread, self._ask, line)
            finally:
                self._waiting -= 1
            self._note(digest, reason)
        if (reason := self._known[digest]) is not None:
            raise InvalidRequest(reason)

    def close(self) -> None:
        """Ends the process; a later check starts another."""
        self._end_process()
        self._process = None

    def _note(self, digest: bytes, reason: str | None) -> None:
        self._known[digest] = reason
        if len(self._known) > KEPT:
            self._known.popitem(last=False)

    def _ask(self, line: str) -> str | None:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        try:
            print(line, file=process.stdin, flush=True)
            ready, _, _ = select.select([process.stdout], [], [], ANSWER_S)
            if ready and (answer := process.stdout.readline()):
                return json.loads(answer)
        except BrokenPipeError:
            pass
        self._end_process()
        self._process = None
        raise Unavailable("the grammar could not be tried; it may be asked again")

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-m", "isthmus.model.grammar.trial"]
            pipe, none = subprocess.PIPE, subprocess.DEVNULL
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=none, text=True)
            self._end_process = weakref.finalize(self, _end, self._process)
            assert self._process.stdin is not None
            print(self._about, file=self._process.stdin)
        return self._process


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()

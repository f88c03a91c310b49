"""A process that compiles grammars of strangers, each in a child of its own that has a little time and memory.

    python -m isthmus.model.grammar.trial

llguidance bounds much of what a grammar may cost, and not all of it: a few bytes of a schema can ask for a machine of
millions of states. What is too much ends the child, and nobody else notices.

Lines of JSON come and go: first what the model's special tokens are, then a grammar, and for each a line with what is
wrong with it. It ends with its input.
"""

import json
import os
import resource
import signal
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from ...proto.errors import InvalidRequest
from ...proto.grammar import Grammar
from .llg import compile_grammar, make_tokenizer
from .source import refused

if TYPE_CHECKING:
    from llguidance import LLTokenizer

CPU_S = 0.08
MOST_S = 2.0  # of a clock on the wall, where others have the processor
MEMORY_BYTES = 256 << 20


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the gateway, which ends this process by closing its input
    about = json.loads(sys.stdin.readline())
    try:
        tokenizer = _tokenizer(about)
    except InvalidRequest as error:
        tokenizer = error
    for line in sys.stdin:
        grammar = _grammar(json.loads(line))
        reason = str(tokenizer) if isinstance(tokenizer, InvalidRequest) else _try(tokenizer, grammar)
        print(json.dumps(reason), flush=True)


def _tokenizer(about: dict[str, Any]) -> "LLTokenizer":
    """Single bytes and the special tokens: whether a grammar can be compiled does not depend on the others."""
    special = {int(number): name for number, name in about["special"].items()}
    ends = frozenset(about["ends"])
    first = max({*special, *ends, -1}) + 1
    return make_tokenizer([b""] * first + [bytes([byte]) for byte in range(256)], special, ends, first + 256)


def _grammar(values: dict[str, Any]) -> Grammar:
    return Grammar(kind=values["kind"], text=values["text"], choices=tuple(values["choices"]))


def _try(tokenizer: "LLTokenizer", grammar: Grammar) -> str | None:
    """What is wrong with a grammar; None where nothing is."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reading)
        _limit()
        os.write(writing, json.dumps(_compile(tokenizer, grammar)).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as told:
        answer = told.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        return json.loads(answer)
    if status in (-signal.SIGPROF, -signal.SIGALRM):
        why = f"it takes more than {CPU_S * 1e3:g} ms"
    elif status == -signal.SIGABRT:
        why = f"it takes more than {MEMORY_BYTES >> 20} MiB"
    else:
        why = "llguidance fails over it"
    return str(refused(grammar, f"{why}; allowed: less size, nesting, and counts of repetition"))


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    signal.setitimer(signal.ITIMER_REAL, MOST_S)
    signal.setitimer(signal.ITIMER_PROF, CPU_S)


def _compile(tokenizer: "LLTokenizer", grammar: Grammar) -> str | None:
    try:
        matcher = compile_grammar(tokenizer, grammar)
    except InvalidRequest as error:
        return str(error)
    matcher.fill(np.zeros(-(-tokenizer.vocab_size // 32), dtype=np.int32))
    return str(refused(grammar, "no output satisfies it")) if matcher.error() is not None else None


if __name__ == "__main__":
    main()

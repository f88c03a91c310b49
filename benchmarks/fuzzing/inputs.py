"""Inputs that were sent, and what came of a run; what broke something is kept as a file that can be sent again.

An input is drawn from the run's seed and its own number, so that the same run draws it again; but what it does can
depend on what came before, so the last ones before a crash are kept with it.
"""

import base64
import json
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

LAST = 60  # inputs that are kept of those before a crash
SAVED = 200  # files at most of one run


@dataclass(frozen=True, kw_only=True)
class Input:
    """One thing that was sent somewhere."""

    kind: str  # "rpc", "http2", "raw", "frames", "file", "certificate"
    target: str  # name of a port (`Fleet.label`), or of a parser
    what: str  # the method, or what was done to the bytes
    number: int
    data: bytes = b""

    def line(self) -> str:
        """As one line of a file."""
        return json.dumps(asdict(self) | {"data": base64.b85encode(self.data).decode()})

    @classmethod
    def of_line(cls, line: str) -> Self:
        """The input of a line."""
        values = json.loads(line)
        return cls(**values | {"data": base64.b85decode(values["data"])})


@dataclass
class Outcome:
    """What a run has seen."""

    seed: int
    folder: Path  # where inputs are kept that broke something
    inputs: Counter[str] = field(default_factory=Counter)  # by kind
    done: Counter[tuple[str, str]] = field(default_factory=Counter)  # by kind and what was done
    statuses: Counter[str] = field(default_factory=Counter)  # of calls
    good: Counter[str] = field(default_factory=Counter)  # good requests, by what became of them
    wrong_tokens: int = 0
    crashes: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)  # all else that must not be
    _last: deque[Input] = field(default_factory=lambda: deque(maxlen=LAST))
    _saved: int = 0

    def sent(self, made: Input) -> None:
        """Counts an input."""
        self.inputs[made.kind] += 1
        self.done[made.kind, made.what] += 1
        self._last.append(made)

    def crashed(self, why: str, target: str) -> None:
        """A process died: keeps the last inputs, those that went to it or to all."""
        self.crashes.append(f"{why}; {self.keep(f'crash-{target}', tuple(self._last))}")

    def hung(self, why: str, target: str) -> None:
        """A process or a request gave no answer."""
        self.hangs.append(f"{why}; {self.keep(f'hang-{target}', tuple(self._last))}")

    def failed(self, why: str, made: Input | None = None) -> None:
        """Anything else that is wrong."""
        self.failures.append(why + (f"; {self.keep(f'failure-{made.kind}', [made])}" if made else ""))

    def keep(self, name: str, inputs: Sequence[Input]) -> str:
        """Writes inputs to a file of their own, one a line; where."""
        if self._saved >= SAVED:
            return "not kept: too many"
        self._saved += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}-{self.seed}-{self._saved}.jsonl"
        path.write_text("".join(made.line() + "\n" for made in inputs))
        return str(path)

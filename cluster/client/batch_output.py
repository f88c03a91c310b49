"""The files that a batch run writes: answers, errors, and what a second run needs to go on.

An answer or an error is one whole line, written once. A run that was interrupted may leave half a line at the end of a
file: the next run cuts it off, and asks again for what it held, which the gateway still has.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from ...proto.common_pb2 import FINISH_REASON_LENGTH, FinishReason
from ...proto.errors import IllegalState, InvalidRequest
from ...proto.jobs_pb2 import JobResult
from .batch_lines import BadLine, Line


@dataclass(frozen=True, kw_only=True)
class Paths:
    """`errors` and `state` lie beside the output."""

    output: Path

    @property
    def errors(self) -> Path:
        """Bad lines and requests that failed, with their line numbers."""
        return self.output.with_name(self.output.name + ".errors.jsonl")

    @property
    def state(self) -> Path:
        """There while a run is not finished."""
        return self.output.with_name(self.output.name + ".state")


class BatchFiles:
    """Belongs to one run; a context manager."""

    def __init__(self, paths: Paths, run_id: str, done: set[int]) -> None:
        self.run_id = run_id
        self.done = done  # numbers of lines that are answered or in the error file
        self._paths = paths
        self._output = paths.output.open("ab")
        self._errors = paths.errors.open("ab")

    @classmethod
    def open(cls, paths: Paths, source: Path, settings: dict[str, Any]) -> Self:
        """Begins a run, or goes on with the one that `state` tells of.

        IllegalState where the output is there but no run to go on with, or that run was of another input or settings.
        """
        state = {"input": _digest(source), **settings}
        if not paths.state.exists():
            if paths.output.exists() and paths.output.stat().st_size:
                raise IllegalState(f"{paths.output} is there already: remove it, or name another output")
            run_id = hashlib.sha256(os.urandom(32)).hexdigest()[:24]
            paths.errors.unlink(missing_ok=True)
            _write_whole(paths.state, json.dumps({**state, "run": run_id}).encode())
            return cls(paths, run_id, set())
        found = json.loads(paths.state.read_text())
        run_id = found.pop("run")
        if found != state:
            differ = ", ".join(sorted(key for key in state if found.get(key) != state[key]))
            raise IllegalState(
                f"{paths.output} was begun with another {differ}: run it as before, or remove {paths.state} and "
                f"{paths.output} to begin again"
            )
        return cls(paths, run_id, set(_finished_lines(paths.output)) | set(_finished_lines(paths.errors)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._output.close()
        self._errors.close()

    def answer(self, line: Line, result: JobResult, model: str) -> None:
        """Writes one answer."""
        _append(self._output, formatted(line, result, model))
        self.done.add(line.number)

    def error(self, number: int, custom_id: str | None, code: str, message: str) -> None:
        """Writes one error."""
        entry = {"line": number, "custom_id": custom_id, "error": {"code": code, "message": message}}
        _append(self._errors, entry)
        self.done.add(number)

    def bad(self, line: BadLine) -> None:
        """Writes a line that is no request."""
        self.error(line.number, line.custom_id, "INVALID_ARGUMENT", line.reason)

    def sync(self) -> None:
        """Everything so far is on the disk."""
        for file in (self._output, self._errors):
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Ends the run: there is nothing to go on with any more."""
        self.sync()
        if not self._paths.errors.stat().st_size:
            self._paths.errors.unlink()
        self._paths.state.unlink()


def formatted(line: Line, result: JobResult, model: str) -> dict[str, Any]:
    """An answer as OpenAI's output files have it, or plain, as its line was; `line` tells the place in the input."""
    usage = {
        "prompt_tokens": result.usage.prompt_tokens,
        "completion_tokens": result.usage.output_tokens,
        "total_tokens": result.usage.prompt_tokens + result.usage.output_tokens,
    }
    if line.kind == "plain":
        finish = FinishReason.Name(result.finish_reason).removeprefix("FINISH_REASON_").lower()
        own = {} if line.custom_id is None else {"custom_id": line.custom_id}
        seed = result.timings.seed
        return {"line": line.number, **own, "text": result.text, "finish_reason": finish, "usage": usage, "seed": seed}
    finish = "length" if result.finish_reason == FINISH_REASON_LENGTH else "stop"
    chat = line.kind == "chat"
    text = {"message": {"role": "assistant", "content": result.text}} if chat else {"text": result.text}
    body = {
        "id": result.request_id,
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, **text, "logprobs": None, "finish_reason": finish}],
        "usage": usage,
    }
    response = {"status_code": 200, "request_id": result.request_id, "body": body}
    return {
        "id": result.request_id,
        "custom_id": line.custom_id,
        "line": line.number,
        "response": response,
        "error": None,
    }


def _append(file: BinaryIO, entry: dict[str, Any]) -> None:
    try:
        line = json.dumps(entry, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate in a custom_id has no UTF-8
        line = json.dumps(entry).encode()
    file.write(line + b"\n")


def _finished_lines(path: Path) -> Iterator[int]:
    """The line numbers in a file of an earlier run; half a line at its end is cut off."""
    if not path.exists():
        return
    whole = 0
    with path.open("r+b") as file:
        for raw in file:
            if not raw.endswith(b"\n"):
                break
            whole += len(raw)
            try:
                yield json.loads(raw)["line"]
            except (ValueError, KeyError, TypeError):
                raise InvalidRequest(f"{path} has a line that no batch run wrote: {raw[:80]!r}") from None
        file.truncate(whole)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from None


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)

"""One line of the log at the end of each request: who, what model and codec, how many tokens, how it ended.

What was asked and answered is never in it, unless the setting `log_content` says so, and neither is what a caller is
told of its own mistake: that may repeat the caller's words.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

from ...proto.errors import InvalidRequest, IsthmusError, NotFound, PermissionDenied, shown
from ...proto.generation_pb2 import GenerateRequest
from ...proto.names import MAX_NAME
from ...proto.rpc.statuses import code_of
from ..text.served import ServedModel
from .session import Session

log = logging.getLogger(__name__)

_OF_THE_CALLER = (InvalidRequest, NotFound, PermissionDenied)  # their text may be the caller's own


class RequestLog:
    """The log of one gateway's requests; `content`: with prompts and outputs."""

    def __init__(self, model: ServedModel, *, content: bool) -> None:
        self._model = model
        self.content = content

    @contextlib.contextmanager
    def run(self, session: Session) -> Iterator[None]:
        """Around the run of a request: the line is written at its end, whatever that is."""
        try:
            yield
        except BaseException as error:
            self._ended(session, self._end(error))
            raise
        self._ended(session, {"status": "OK"})

    @contextlib.contextmanager
    def before_run(self, request: GenerateRequest, arrived_s: float) -> Iterator[None]:
        """Around all that comes before its run: the line is written where it ends there."""
        try:
            yield
        except BaseException as error:
            fields = {
                "request_id": _cut(request.request_id),
                "tenant": _cut(request.tenant),
                "model": self._model.name,
                "codec": _cut(request.codec),
                **self._end(error),
                "ms": _ms_since(arrived_s),
                "prompt_tokens": 0,
                "output_tokens": 0,
            }
            log.info("request ended", extra={"fields": fields})
            raise

    def _end(self, error: BaseException) -> dict[str, str]:
        """Its status, and why, as far as that may be logged."""
        if isinstance(error, asyncio.CancelledError):
            return {"status": "CANCELLED"}
        if not isinstance(error, IsthmusError):
            return {"status": "UNKNOWN"}
        known = self.content or not isinstance(error, _OF_THE_CALLER)
        return {"status": code_of(error).name, **({"why": str(error)} if known else {})}

    def _ended(self, session: Session, end: dict[str, str]) -> None:
        request, usage = session.request, session.usage()
        fields = {
            "request_id": request.request_id,
            "tenant": request.tenant,
            "model": self._model.name,
            "codec": request.codec,
            **end,
            "ms": _ms_since(session.arrived_s),
            "prompt_tokens": usage.prompt_tokens,
            "output_tokens": usage.output_tokens,
            **({"choice": request.choice} if request.choice is not None else {}),
            "decode_worker": session.decode_worker,
            "replays": session.replays,
            **(self._content(session) if self.content else {}),
        }
        log.info("request ended", extra={"fields": fields})

    def _content(self, session: Session) -> dict[str, Any]:
        prompt, output = self._model.new_decoder(), self._model.new_decoder()
        return {
            "prompt": prompt.push(session.request.prompt_token_ids) + prompt.finish(),
            "output": output.push(session.token_ids) + output.finish(),
        }


def _ms_since(arrived_s: float) -> float:
    return round((time.monotonic() - arrived_s) * 1e3, 1)


def _cut(name: str) -> str:
    """A name that nobody has checked."""
    return name if len(name) <= MAX_NAME else shown(name)

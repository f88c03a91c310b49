"""How errors read on the command line: the name of the status, then what was wrong."""

import grpc
import grpc.aio

from ....proto.errors import IsthmusError, status_of
from ...client.client import RETRY_KEY


def line_of(error: Exception) -> str | None:
    """One line for an error that is meant for a user; None for anything else, which is a bug."""
    if isinstance(error, IsthmusError):
        return f"{status_of(error).name}: {error}"
    if isinstance(error, grpc.aio.AioRpcError):
        return _status_line(error)
    if isinstance(error, OSError):
        return str(error)
    return None


def _status_line(error: grpc.aio.AioRpcError) -> str:
    line = f"{error.code().name}: {error.details() or 'no details'}"
    for key, value in error.trailing_metadata() or ():
        if key == RETRY_KEY:
            line += f" (try again in {value} ms)"
    return line

"""How errors read on the command line: the name of the status, then what was wrong."""

import grpc
import grpc.aio

from ....proto.errors import IsthmusError
from ....proto.rpc.statuses import code_of, error_of


def line_of(error: Exception) -> str | None:
    """One line for an error that is meant for a user; None for anything else, which is a bug."""
    if isinstance(error, IsthmusError):
        return f"{code_of(error).name}: {error}"
    if isinstance(error, grpc.aio.AioRpcError):
        return _status_line(error)
    if isinstance(error, OSError):
        return str(error)
    return None


def _status_line(error: grpc.aio.AioRpcError) -> str:
    line, known = f"{error.code().name}: {error.details() or 'no details'}", error_of(error)
    if isinstance(known, IsthmusError) and known.retry_after_s is not None:
        line += f" (try again in {1e3 * known.retry_after_s:.0f} ms)"
    return line

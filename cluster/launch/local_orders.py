"""Orders from the worker's own host: each worker process serves `isthmus.v1.Worker` on a Unix socket too.

The socket is in a folder that only its user may enter, so whoever can dial it is that user: no certificate is asked
for. It is there from before the model is loaded until the process ends, and stays through flips.
"""

import asyncio
import contextlib
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import grpc.aio

from ...proto.errors import InvalidRequest, Unavailable
from ...proto.rpc.aio_server import aio_server
from ...proto.rpc.interceptor import ErrorInterceptor
from ...proto.worker_pb2 import DrainRequest, DrainResponse, FlipRequest, GetReportRequest, WatchRequest, WorkerReport
from ...proto.worker_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server
from ...worker.service import OrderServicer

FOLDER = "ISTHMUS_RUNTIME"  # names the folder
OWN_LABEL = "isthmus-up"  # of the node of a Ray that `isthmus up` has started, and which ends with that
PATH_BYTES = 80  # of the folder's; those of a socket may have 107 on Linux


def runtime_folder() -> Path:
    """Where the sockets of this user's workers are; made where it is missing.

    InvalidRequest where it cannot be made, is somebody else's or open to others, or its path is too long for a socket.
    """
    folder = _folders()[0]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(folder, f"cannot be made ({error.strerror})") from None
    if not _is_private(folder):
        raise _unusable(folder, f"is not a folder of user {os.getuid()} with mode 0700")
    if len(os.fsencode(folder)) > PATH_BYTES:
        raise _unusable(folder, f"has a path of more than {PATH_BYTES} bytes")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unusable(folder, "cannot be written to")
    return folder


def _unusable(folder: Path, why: str) -> InvalidRequest:
    return InvalidRequest(f"{folder}, for the sockets of this user's workers, {why}; {FOLDER} names another folder")


def _folders() -> list[Path]:
    """The folder for sockets, then others where workers of this user may have theirs: a service has no XDG_RUNTIME_DIR
    where a login has one. That of another user is none (su keeps the variable)."""
    if named := os.environ.get(FOLDER):
        return [Path(named)]
    user = os.getuid()
    found = [Path(tempfile.gettempdir()) / f"isthmus-{user}"]
    for place, base in ((0, os.environ.get("XDG_RUNTIME_DIR")), (len(found) + 1, f"/run/user/{user}")):
        with contextlib.suppress(OSError):
            if base and Path(base).is_dir() and os.stat(base).st_uid == user:
                found.insert(place, Path(base) / "isthmus")
    return list(dict.fromkeys(found))


def _is_private(folder: Path) -> bool:
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not stat.S_IMODE(found.st_mode) & 0o077


def sockets() -> Iterator[Path]:
    """Those of the workers of this user on this host that answer; what dead ones have left is removed.

    InvalidRequest as `runtime_folder`.
    """
    runtime_folder()
    for folder in _folders():
        if folder.is_dir() and _is_private(folder):
            yield from _answering(folder)


def pid_of(path: Path) -> int:
    """The process that listens on such a socket."""
    return int(path.name.partition("-")[0])


def _answering(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.glob("*.sock")):
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
            try:
                probe.settimeout(2.0)
                probe.connect(str(path))
            except (ConnectionRefusedError, FileNotFoundError):
                path.unlink(missing_ok=True)
                continue
            except OSError:
                pass  # it is busy: it is there
        yield path


class Host(Protocol):
    """Owns the worker of this process (`role_host.RoleHost`)."""

    @property
    def running(self) -> OrderServicer | None:
        """The service of the worker that serves now; None where none does yet."""
        ...

    async def settle(self) -> None:
        """Waits for a flip that is under way."""
        ...

    def left(self) -> None:
        """The worker was drained by order, and the caller has its answer."""
        ...


class _Orders(WorkerServicer):
    """Passes on to the worker that serves now."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def GetReport(self, request: GetReportRequest, context: grpc.aio.ServicerContext) -> WorkerReport:
        return await (await self._serving()).GetReport(request, context)

    async def Watch(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: WatchRequest, context: grpc.aio.ServicerContext
    ) -> None:
        await (await self._serving()).Watch(request, context)

    async def Drain(self, request: DrainRequest, context: grpc.aio.ServicerContext) -> DrainResponse:
        await self._host.settle()
        if (serving := self._host.running) is not None:
            return await serving.Drain(request, context)
        self._host.left()  # nothing runs where the model is still being loaded
        return DrainResponse()

    async def Flip(self, request: FlipRequest, context: grpc.aio.ServicerContext) -> DrainResponse:
        return await (await self._serving()).Flip(request, context)

    async def _serving(self) -> OrderServicer:
        await self._host.settle()
        if (serving := self._host.running) is None:
            raise Unavailable("the worker is starting")
        return serving


class LocalOrders:
    """The socket of one process."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._path: Path | None = None
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Listens; InvalidRequest where the folder cannot be used."""
        folder = await asyncio.to_thread(runtime_folder)
        path = folder / f"{os.getpid()}-{id(self):x}.sock"
        self._server = aio_server(interceptors=[ErrorInterceptor()])
        add_WorkerServicer_to_server(_Orders(self._host), self._server)
        try:
            self._server.add_insecure_port(f"unix:{path}")
        except RuntimeError as error:
            raise _unusable(folder, f"holds no socket ({error})") from None
        self._path = path
        await self._server.start()

    async def stop(self) -> None:
        """Ends the socket."""
        if self._server is not None:
            await self._server.stop(0.2)
        if self._path is not None:
            self._path.unlink(missing_ok=True)

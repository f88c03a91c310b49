"""Orders from the worker's own host: each worker process serves `isthmus.v1.Worker` on a Unix socket too.

The socket is in a folder that only its user may enter, so whoever can dial it is that user: no certificate is asked
for. It is there from before the model is loaded until the process ends, and stays through flips.
"""

import asyncio
import contextlib
import errno
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import grpc.aio

from ...proto.errors import Unavailable
from ...proto.rpc.aio_server import aio_server
from ...proto.rpc.interceptor import ErrorInterceptor
from ...proto.worker_pb2 import DrainRequest, DrainResponse, FlipRequest, GetReportRequest, WatchRequest, WorkerReport
from ...proto.worker_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server
from ...worker.service import OrderServicer

FOLDER = "ISTHMUS_RUNTIME"  # names the folder


def runtime_folder() -> Path:
    """Where the sockets of this user's workers are; made where it is missing.

    OSError where it is somebody else's, or others may enter it.
    """
    named, base = os.environ.get(FOLDER), os.environ.get("XDG_RUNTIME_DIR")
    default = Path(base) / "isthmus" if base and Path(base).is_dir() else _in_temporary()
    folder = Path(named) if named else default
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        why = f"it must be a folder of user {os.getuid()} with mode 0700; name another one with {FOLDER}"
        raise PermissionError(errno.EPERM, why, str(folder))
    return folder


def _in_temporary() -> Path:
    return Path(tempfile.gettempdir()) / f"isthmus-{os.getuid()}"


def sockets() -> Iterator[Path]:
    """Those of the workers of this user on this host that answer; what dead ones have left is removed."""
    for path in sorted(runtime_folder().glob("*.sock")):
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
        """Listens; OSError where the folder cannot be used."""
        folder = await asyncio.to_thread(runtime_folder)
        path = folder / f"{os.getpid()}-{id(self):x}.sock"
        self._server = aio_server(interceptors=[ErrorInterceptor()])
        add_WorkerServicer_to_server(_Orders(self._host), self._server)
        try:
            self._server.add_insecure_port(f"unix:{path}")
        except RuntimeError as error:
            raise OSError(f"cannot listen on {path}: is the path too long? {FOLDER} names another folder") from error
        self._path = path
        await self._server.start()

    async def stop(self) -> None:
        """Ends the socket."""
        if self._server is not None:
            await self._server.stop(0.2)
        if self._path is not None:
            self._path.unlink(missing_ok=True)

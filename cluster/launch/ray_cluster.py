"""Workers as Ray actors: Ray starts, places and names them. No request ever passes through it.

Ray restarts none of them: it would do so at once, again and again, and the supervisor does it with growing pauses.
"""

import asyncio
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from ...proto.errors import AlreadyExists, IsthmusError, Unavailable
from ...proto.rpc.addresses import HostPort, parse_address
from ...proto.security.settings import material_of
from ...proto.security.state import LOCAL, hand_over
from ...worker.service import Drained
from ..config import ClusterConfig
from ..fleet.report import Role
from .local_orders import OWN_LABEL, runtime_folder
from .worker_thread import End, WorkerThread, cores_for_one, end_process, thread_settings, usable_cores

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 100 << 20  # nothing of ours is kept there
NAMESPACE = "isthmus"

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Spare Python processes started ahead cost more of a small machine than they save.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    # Where Ray's head dies, its other processes end themselves after a minute, and this one (gateway and requests)
    # with them. No request needs the head: they stay until the supervisor has them end.
    "RAY_gcs_rpc_server_reconnect_timeout_s": str(365 * 24 * 3600),
}
# For one question whether a worker has ended: a call of an actor goes on where its caller is gone, and holds a thread.
CLOSED_S = 15.0
HEAD_POLL_S = 1.0  # between two checks of whether Ray's head is there
HEAD_MISSES = 3  # in a row, of a head that is gone


class RayWorker:
    """One worker actor, for the life of its process."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name = name
        self._actor = actor

    @property
    def actor_id(self) -> Any:
        """Ray's id of it."""
        return self._actor._actor_id

    async def address(self) -> str:
        """host:port of the worker as it runs now, once it serves.

        Raises what its start raised; Unavailable where it died for good.
        """
        return await self._call("address")

    async def activity(self) -> str:
        """What its start is doing, in a few words; "" where there is nothing to tell."""
        return await self._call("activity")

    async def role(self) -> Role:
        """The one that it has now."""
        return await self._call("role")

    async def wait_closed(self) -> bool:
        """Returns when the process that runs the worker now has ended, for whatever reason; whether it said that it
        was drained on its host."""
        end: End | None = None
        with contextlib.suppress(IsthmusError):
            while end is None:
                end = await self._call("wait_closed", CLOSED_S)
        return end == "drained"

    async def drain(self, timeout_s: float) -> Drained:
        """Takes no new work, waits at most so long for what runs, and hands over the rest."""
        return Drained(*await self._call("drain", timeout_s))

    async def stop(self) -> None:
        """Ends it for good."""
        import ray

        await asyncio.to_thread(ray.kill, self._actor)

    async def _call(self, method: str, *args: Any) -> Any:
        from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError

        try:
            return await asyncio.wrap_future(getattr(self._actor, method).remote(*args).future())
        except RayTaskError as error:
            known = isinstance(error.cause, IsthmusError | OSError)
            raise error.cause if known else Unavailable(_last_line(error)) from None
        except ActorUnavailableError as error:
            raise Unavailable(f"worker {self.name} cannot be reached: {_last_line(error)}") from None
        except ActorDiedError as error:
            raise Unavailable(f"worker {self.name} died: {_death(error)}") from None
        except RayError as error:
            raise Unavailable(f"worker {self.name}: {_last_line(error)}") from None


class RayCluster:
    """A local Ray that ends with this process, or a running one that is joined."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self.threads = config.threads or 1
        self._gpus = 0.0
        self._head = ""
        self._starting: asyncio.Task[None] | None = None

    @property
    def one_host(self) -> bool:
        """Whether all workers run on this host."""
        return self._config.address is None

    async def start(self) -> None:
        """Starts or joins Ray. Unavailable where there is none to join or it does not start; InvalidRequest where the
        workers of this host could not have their sockets."""
        if self.one_host:
            await asyncio.to_thread(runtime_folder)  # no worker could start
        self._starting = asyncio.create_task(asyncio.to_thread(self._start))
        await asyncio.shield(self._starting)
        _take_back_signals()

    async def launch(self, role: Role, name: str) -> RayWorker:
        """Asks for one worker; it is there when its `address` returns. Unavailable where Ray's head is gone."""
        if self._config.address is None and not await self._head_answers():
            raise Unavailable("Ray's head is gone: no worker can be started")
        return await asyncio.to_thread(self._launch, role, name)

    async def lost(self) -> None:
        """Returns once the head of the Ray that was started here is gone: no worker can be started any more.

        Never for one that was joined: whoever runs it brings its head back.
        """
        if self._config.address is not None:
            await asyncio.Event().wait()
        missed = 0
        while missed < HEAD_MISSES:
            await asyncio.sleep(HEAD_POLL_S)
            missed = 0 if await self._head_answers() else missed + 1

    async def _head_answers(self) -> bool:
        host, port = parse_address(self._head)
        try:
            async with asyncio.timeout(HEAD_POLL_S):
                _, writer = await asyncio.open_connection(host, port)
        except (OSError, TimeoutError):
            return False
        writer.close()
        return True

    async def close(self) -> None:
        """Ends all workers, and the Ray that was started."""
        if self._starting is None:
            return
        await asyncio.wait([self._starting])  # a start that nobody waits for any more cannot be stopped half-way
        import ray

        await asyncio.to_thread(ray.shutdown)

    def _start(self) -> None:
        joins = self._config.address is not None
        if not joins:
            self.threads = self._config.threads or max(1, usable_cores() // self._config.workers)
            # All processes of a local Ray inherit this: no runtime environment to set up for each worker.
            os.environ.update(thread_settings(self.threads))
        os.environ.update(QUIET)
        import ray

        options: dict[str, Any] = {"address": self._config.address} if joins else self._local_options()
        try:
            with _no_helpers():
                ray.init(namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            what = f"join Ray at {self._config.address}" if joins else "start Ray"
            hint = " (where that Ray asks for a token: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN)" if joins else ""
            raise Unavailable(f"cannot {what}: {_last_line(error)}{hint}") from None
        _silence_raylet()
        _log_as_others()
        self._head = ray.get_runtime_context().gcs_address
        if joins and self._config.threads is None:
            cores = ray.cluster_resources().get("CPU", 1)
            self.threads = max(1, int(cores) // max(1, self._config.workers))
        if self._config.device != "cpu":
            self._gpus = min(1.0, ray.cluster_resources().get("GPU", 0) / max(1, self._config.workers))

    def _local_options(self) -> dict[str, Any]:
        return {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": max(usable_cores(), self.threads * self._config.workers),
            "object_store_memory": OBJECT_STORE_BYTES,
            "labels": {OWN_LABEL: "own"},
        }

    def _launch(self, role: Role, name: str) -> RayWorker:
        import ray

        host = "0.0.0.0" if self._config.address is not None else "127.0.0.1"
        listen = str(HostPort(host, self._worker_port))
        roles: tuple[Role, Role] = ("prefill", "decode") if role == "prefill" else ("decode", "prefill")
        settings = [self._config.worker_settings(each, name, listen, self._worker_threads) for each in roles]
        if any(each["tls"] == "auto" for each in settings):
            handed_over = material_of(*hand_over(self._config.named_cluster or LOCAL, name))
            settings = [{**each, "tls": handed_over} if each["tls"] == "auto" else each for each in settings]
        try:
            actor = ray.remote(WorkerActor).options(**self._actor_options(role, name)).remote(role, *settings)
        except ValueError as error:  # Ray's for a name that is taken
            why = f"on Ray: {_last_line(error)}; is another cluster there with the id {self._config.cluster_id}?"
            raise AlreadyExists(f"cannot start {name} {why}") from None
        return RayWorker(name, actor)

    @property
    def _worker_threads(self) -> int | None:
        """PyTorch threads of each worker; None: what it decides itself."""
        return self.threads

    @property
    def _worker_port(self) -> int:
        """Of each worker; 0: a free one."""
        return 0

    def _actor_options(self, role: Role, name: str) -> dict[str, Any]:
        """What Ray is asked for; `name` outlives the process."""
        joins = self._config.address is not None
        options: dict[str, Any] = {
            "name": self.actor_name(name),
            # On the local Ray, which is ours alone, a cluster may be scaled past what was counted at its start.
            "num_cpus": self.threads if joins else 0,
            "num_gpus": self._gpus,
            "max_restarts": 0,
            "max_concurrency": 5,  # waiting for the address or the end must not keep others out
        }
        if joins:
            options["runtime_env"] = {"env_vars": thread_settings(self.threads)}
            options["scheduling_strategy"] = "SPREAD"
        return options

    def actor_name(self, name: str) -> str:
        """Of a worker, in the namespace that clusters share."""
        return f"{name}.{self._config.cluster_id}"


class WorkerActor(WorkerThread):
    """A WorkerThread that listens on its Ray node's own address where the settings say any address."""

    end_process = staticmethod(end_process)
    orders_from_host = True

    def __init__(self, role: Role, settings: Mapping[str, Any], other: Mapping[str, Any]) -> None:
        import ray.util

        threads, port = settings.get("threads"), parse_address(str(settings["listen"])).port
        if threads is None:  # of a worker with a port that was given, which has its host for itself
            threads = usable_cores() if port else cores_for_one()
        os.environ.update(thread_settings(threads))  # PyTorch is not imported yet
        settings, other = {**settings, "threads": threads}, {**other, "threads": threads}
        bound = parse_address(str(settings["listen"]))
        host = ray.util.get_node_ip_address() if bound.is_any else bound.host
        listen = {"listen": str(HostPort(host, bound.port))}
        super().__init__(role, {**settings, **listen}, {**other, **listen})


@contextlib.contextmanager
def _no_helpers() -> Iterator[None]:
    """Without the processes of a local Ray that serve nothing here: autoscaler, dashboard, forwarder of logs.

    Each imports for two seconds of a core while workers want to start. Ray has no settings for it.
    """
    from ray._private.node import Node

    names = [name for name in ("start_monitor", "start_log_monitor", "start_api_server") if hasattr(Node, name)]
    before = {name: getattr(Node, name) for name in names}
    for name in names:
        setattr(Node, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Node, name, method)


def _silence_raylet() -> None:
    """Sends what Ray's daemons print about dead workers to the log: the supervisor says it in one line."""
    import ray._private.worker

    def to_log(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
        log.debug("raylet: %s", " ".join(str(line) for line in data.get("lines", ())))

    if hasattr(ray._private.worker, "print_to_stdstream"):  # private: there is no setting for it
        ray._private.worker.print_to_stdstream = to_log


def _death(error: BaseException) -> str:
    """Why Ray says that an actor is gone, in a few words: of a process it does not know, and lists what might be."""
    text = _last_line(error)
    if "worker process has died" in text:
        return "its process was killed (out of memory?) or crashed; Ray's log of it, on its node, may say why"
    return text


def _log_as_others() -> None:
    """What Ray's Python logs goes the way of all logs; it has made a handler for it that writes text to stderr."""
    logger = logging.getLogger("ray")
    logger.handlers.clear()
    logger.propagate = True


def _take_back_signals() -> None:
    """Ray has installed a handler of its own for SIGTERM, which prints a stack before it calls ours."""
    handler = signal.getsignal(signal.SIGTERM)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
        signal.siginterrupt(signal.SIGTERM, False)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

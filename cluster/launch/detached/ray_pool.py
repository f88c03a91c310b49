"""Detached Ray actors: workers that outlive their supervisor, which finds them again by their names.

An actor asks for no CPUs. It asks for one of the resource of its role (`prefill`, `decode`) where a host of Ray has
that, or where each worker has the same port: Ray then places one worker a host, on a host of its role.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from ....proto.errors import IsthmusError, NotFound, Unavailable
from ...config import ClusterConfig
from ...fleet.report import Role
from ..ray_cluster import NAMESPACE, RayCluster, RayWorker
from .desired import Desired

T = TypeVar("T")

GONE_S = 60.0  # for the head of Ray to be back
CALLS = 4  # of Ray that may wait for its head at once


class RayPool(RayCluster):
    """A Ray that runs here, and the detached actors of one cluster on it."""

    def __init__(self, config: ClusterConfig) -> None:
        super().__init__(config.model_copy(update={"address": config.address or "auto"}))
        self._calls = ThreadPoolExecutor(CALLS, "ray")  # a call of Ray waits for its head, for as long as that is away
        self._have: Mapping[str, float] = {}  # resources of Ray's hosts, when looked at last

    async def launch(self, role: Role, name: str) -> RayWorker:
        """Asks for one worker; one of this name that runs already is taken instead."""
        with contextlib.suppress(NotFound):
            return await self.find(name)
        return await self._call(self._launch, role, name)

    async def find(self, name: str) -> RayWorker:
        """The worker of this name, which another supervisor started, or this one before; NotFound."""
        return await self._call(self._find, name)

    async def existing(self) -> list[str]:
        """Names of the workers of this cluster that Ray has, those too that wait for a host."""
        return await self._call(self._existing)

    async def waits_for(self, worker: RayWorker, role: Role) -> str:
        """What a worker waits for that Ray has placed nowhere yet; "" where it is placed."""
        if await self._call(self._is_placed, worker):
            return ""
        return f"waits for a node with {_shown(self.bundle(role))}"

    def bundle(self, role: Role) -> dict[str, float]:
        """The resources of one worker, as Ray's autoscaler counts them."""
        options = self._actor_options(role, "")
        gpus = {"GPU": options["num_gpus"]} if options["num_gpus"] else {}
        return {**options.get("resources", {}), **gpus}

    async def request(self, counts: Mapping[Role, int]) -> None:
        """Has Ray's autoscaler, where there is one, make room for so many workers, and no more."""
        await self._call(self._look)
        bundles = [self.bundle(role) for role, count in counts.items() for _ in range(count)]
        await self._call(_request, [bundle for bundle in bundles if bundle])

    async def load(self) -> Desired | None:
        """What the supervisor before this one wanted; None where there was none on this Ray."""
        stored = await self._call(self._stored)
        return Desired.from_json(stored) if stored else None

    async def save(self, desired: Desired) -> None:
        """Keeps what is wanted, for as long as this Ray lives."""
        await self._call(self._store, desired.to_json())

    async def lost(self) -> None:
        """Returns once the head of Ray has been gone for long, or is that of another Ray: all workers are another's."""
        missed_s, session = 0.0, await self._call(_session)
        while missed_s < GONE_S:
            await asyncio.sleep(1.0)
            if not await self._head_answers():
                missed_s += 1.0
                continue
            missed_s = 0.0
            with contextlib.suppress(IsthmusError, TimeoutError):
                async with asyncio.timeout(5):
                    if await self._call(_session_at, self._head) != session:
                        return

    async def close(self) -> None:
        """Lets go of Ray; the workers stay."""
        self._calls.shutdown(wait=False, cancel_futures=True)
        await super().close()

    def _start(self) -> None:
        super()._start()
        self._look()

    def _look(self) -> None:
        import ray

        self._have = ray.cluster_resources()

    def _launch(self, role: Role, name: str) -> RayWorker:
        self._look()
        return super()._launch(role, name)

    def _actor_options(self, role: Role, name: str) -> dict[str, Any]:
        gpus = self._config.prefill_gpus if role == "prefill" else self._config.decode_gpus
        if gpus is None:
            gpus = int(self._config.device != "cpu" and self._have.get("GPU", 0) >= 1)
        options: dict[str, Any] = {
            "name": self.actor_name(name),
            "lifetime": "detached",
            "num_cpus": 0,
            "num_gpus": gpus,
            "max_restarts": 0,
            "max_concurrency": 10,  # waiting for the address or the end must not keep others out
            "scheduling_strategy": "SPREAD",
        }
        if self._config.worker_port is not None or role in self._have:
            options["resources"] = {role: 1}
        return options

    @property
    def _worker_threads(self) -> int | None:
        return self._config.threads

    @property
    def _worker_port(self) -> int:
        return self._config.worker_port or 0

    def _find(self, name: str) -> RayWorker:
        import ray

        try:
            return RayWorker(name, ray.get_actor(self.actor_name(name), namespace=NAMESPACE))
        except ValueError:
            raise NotFound(f"Ray has no worker {name} of cluster {self._config.cluster_id}") from None

    def _existing(self) -> list[str]:
        import ray.util

        named: list[Any] = ray.util.list_named_actors(all_namespaces=True)
        ours = [actor["name"] for actor in named if actor["namespace"] == NAMESPACE]
        return [name.removesuffix(ending) for name in ours if name.endswith(ending := self.actor_name(""))]

    def _is_placed(self, worker: RayWorker) -> bool:
        from ray._private.state import state  # there is no public way to ask without Ray's dashboard
        from ray.core.generated import gcs_pb2

        read: Any = gcs_pb2
        found = state._connect_and_get_accessor().get_actor_info(worker.actor_id)
        return found is None or bool(read.ActorTableData.FromString(found).address.worker_id)

    def _stored(self) -> bytes | None:
        from ray.experimental.internal_kv import _internal_kv_get

        return _internal_kv_get(self._key)

    def _store(self, data: bytes) -> None:
        from ray.experimental.internal_kv import _internal_kv_put

        _internal_kv_put(self._key, data, overwrite=True)

    @property
    def _key(self) -> str:
        return f"isthmus.{self._config.cluster_id}"

    async def _call(self, call: Callable[..., T], *args: Any) -> T:
        """In a thread: Ray's calls block. Unavailable where Ray cannot do it."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._calls, partial(call, *args))
        except IsthmusError:
            raise
        except Exception as error:
            raise Unavailable(f"Ray: {' '.join(str(error).split()) or type(error).__name__}") from error


def _request(bundles: list[dict[str, float]]) -> None:
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=bundles)


def _session() -> str:
    import ray

    return ray.get_runtime_context().get_session_name()


def _session_at(head: str) -> str:
    from ray import _raylet

    module: Any = _raylet
    name = module.GcsClient(address=head).internal_kv_get(b"session_name", b"session", timeout=5)
    return name.decode() if name else ""


def _shown(bundle: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {amount:g}" for name, amount in bundle.items()) + "}"

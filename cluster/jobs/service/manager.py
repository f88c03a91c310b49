"""The jobs of one gateway, as a whole: the store, the service and the runner, started and stopped together."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Self

import grpc.aio

from ....proto.jobs_pb2_grpc import add_JobsServicer_to_server
from ....proto.tasks import Tasks
from ....proto.worker_pb2 import WorkerReport
from ...access.access import Access
from ...access.settings import AccessSettings
from ...text.served import ServedModel
from ..runner.answer import RequestRunner
from ..runner.runner import Runner
from ..settings import JobsSettings
from ..store.store import JobStore
from .service import JobsService


class Jobs:
    """Made by `open`; `add_to` a server, `start`, and at the end `stop`."""

    def __init__(self, store: JobStore, service: JobsService, runner: Runner) -> None:
        self._store = store
        self._service = service
        self._runner = runner

    @classmethod
    async def open(
        cls,
        url: str,
        model: ServedModel,
        generator: RequestRunner,
        *,
        default_codec: Callable[[], str],
        reports: Callable[[], Sequence[WorkerReport]],
        others: Callable[[], int],
        settings: JobsSettings | None = None,
        access: Access | None = None,
        failures: "Counter[str] | None" = None,
    ) -> Self:
        """Opens the database; `access` says whose jobs a caller may see, None that everybody may see all.

        InvalidRequest for a bad URL, Incompatible for one of a newer isthmus, Unavailable.
        """
        settings = settings or JobsSettings()
        store = await JobStore.open(url, settings)
        access = access or Access(AccessSettings())
        service = JobsService(store, model, settings, default_codec, access)
        tasks = Tasks(failures)
        runner = Runner(
            store, generator, model.fingerprint, settings, reports=reports, others=others, access=access, tasks=tasks
        )
        return cls(store, service, runner)

    @property
    def failing(self) -> list[str]:
        """Background tasks that fail again and again."""
        return self._runner.failing

    def add_to(self, server: grpc.aio.Server) -> None:
        """Adds the service."""
        add_JobsServicer_to_server(self._service, server)

    async def start(self, address: str) -> None:
        """Begins to run jobs, as the gateway that listens on `address` of this host."""
        await self._runner.start(address)

    async def drain(self) -> None:
        """Takes no new jobs and stops those that run: they go on in another gateway, or when this one is back."""
        self._service.draining = True
        await self._runner.stop()

    async def stop(self) -> None:
        """Drains, and closes the database."""
        await self.drain()
        await self._store.close()

"""`isthmus.v1.Generation`: what clients ask of the model."""

from functools import partial

import grpc.aio

from ...proto import generation_pb2, generation_pb2_grpc
from ...proto.rpc.streams import write_in_time
from ...proto.rpc.trace import trace_context
from ..requests.request import ResolvedRequest
from .answering import Answering
from .models import Models


class GenerationService(generation_pb2_grpc.GenerationServicer):
    """One model on the workers of a fleet."""

    def __init__(self, answering: Answering, models: Models) -> None:
        self._answering = answering
        self._models = models

    async def Generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        request: generation_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext[generation_pb2.GenerateRequest, generation_pb2.GenerateEvent],
    ) -> None:
        async def accepted(_: ResolvedRequest) -> None:
            await context.send_initial_metadata(())

        await self._answering.answer(
            request,
            partial(write_in_time, context),
            accepted,
            time_left=context.time_remaining,
            trace=trace_context(context),
        )

    async def GetModel(self, request: generation_pb2.GetModelRequest, context: object) -> generation_pb2.Model:
        return self._models.describe(request.name)

    async def ListModels(
        self, request: generation_pb2.ListModelsRequest, context: object
    ) -> generation_pb2.ListModelsResponse:
        return generation_pb2.ListModelsResponse(models=[self._models.describe()])

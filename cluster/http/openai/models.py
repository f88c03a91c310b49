"""What the gateway serves and whether it can: `/v1/models`, `/health`, `/ready`, `/version`."""

from importlib.metadata import version
from typing import Any, Literal

from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from ....proto.errors import NotFound, Unavailable
from ....proto.generation_pb2 import Model
from ..call import Call
from ..door import Endpoint
from ..errors import UnknownModel


class ModelCard(BaseModel):
    """A model that requests may name."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    codecs: list[str]
    default_codec: str


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    """How the gateway is."""

    status: str


class Version(BaseModel):
    """Of isthmus."""

    version: str


async def list_models(call: Call) -> Response:
    return call.json({"object": "list", "data": [_card(call, call.door.describe(""))]})


async def show_model(call: Call) -> Response:
    name: str = call.request.path_params["model"]
    try:
        return call.json(_card(call, call.door.describe(name)))
    except NotFound as error:
        raise UnknownModel(str(error)) from None


async def health(call: Call) -> Response:
    """Whether the process answers at all."""
    return JSONResponse({"status": "ok"})


async def ready(call: Call) -> Response:
    """Whether a request would be taken: not while the workers are not there, nor while the gateway drains."""
    if not call.door.can_serve():
        raise Unavailable("no request can be served now")
    return JSONResponse({"status": "ready"})


async def show_version(call: Call) -> Response:
    return JSONResponse({"version": version("isthmus")})


def _card(call: Call, model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": call.door.started_unix_s,
        "owned_by": "isthmus",
        "max_model_len": model.context_length,
        "codecs": list(model.codecs),
        "default_codec": model.default_codec,
    }


ENDPOINTS = (
    Endpoint(method="GET", path="/v1/models", summary="The models.", handle=list_models, response=ModelList),
    Endpoint(
        method="GET",
        path="/v1/models/{model:path}",
        summary="One model.",
        handle=show_model,
        response=ModelCard,
        errors=(404,),
    ),
    Endpoint(method="GET", path="/health", summary="Whether it runs.", handle=health, response=Health, open=True),
    Endpoint(
        method="GET",
        path="/ready",
        summary="Whether it takes requests.",
        handle=ready,
        response=Health,
        open=True,
        errors=(503,),
    ),
    Endpoint(method="GET", path="/version", summary="The version.", handle=show_version, response=Version),
)

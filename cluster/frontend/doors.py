"""The HTTP door of a gateway: which families of endpoints it has, and its port."""

import time
from collections.abc import Callable

from ...proto.security.credentials import Security
from ..access.access import Access, check_listen
from ..access.refusals import Refusals
from ..gateway_config import GatewayConfig
from ..http.anthropic.messages import ENDPOINTS as ANTHROPIC
from ..http.app import build_app
from ..http.door import Door
from ..http.openai.endpoints import ENDPOINTS as OPENAI
from ..http.page.route import page_endpoints
from ..http.server import HttpServer
from ..http.tls import security_for
from ..text.served import ServedModel
from .answering import Answering
from .models import Models


async def listen_http(
    config: GatewayConfig,
    security: Security | None,
    answering: Answering,
    model: ServedModel,
    models: Models,
    access: Access,
    refusals: Refusals,
    is_healthy: Callable[[], bool],
) -> HttpServer | None:
    """Starts to serve at `gateway.http_listen`; None where there is none.

    InvalidRequest where nobody has said who may ask there, or that it may be plain text; OSError where the address
    cannot be bound.
    """
    listen = config.http_listen
    if listen is None:
        return None
    check_listen(config.access, listen)
    encrypted = security_for(config.http.tls, listen, security)
    door = Door(
        answer=answering.answer,
        model=model,
        describe=models.describe,
        can_serve=is_healthy,
        access=access,
        refusals=refusals,
        config=config.http,
        started_unix_s=round(time.time()),
    )
    pages = page_endpoints() if config.http.page else ()
    endpoints = (*OPENAI, *ANTHROPIC, *pages)
    app = build_app(door, endpoints, cluster=encrypted.cluster if encrypted is not None else "")
    try:
        return await HttpServer.listen(listen, app, encrypted)
    except OSError as error:
        raise OSError(f"{error} (from gateway.http_listen: --http-port names another port, --no-http none)") from None

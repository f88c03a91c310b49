"""Gateways whose HTTP port is open, and clients of it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from scripted import Script, ScriptedCluster, scripted_cluster


@asynccontextmanager
async def http_cluster(*scripts: Script, **settings: Any) -> AsyncIterator[tuple[ScriptedCluster, httpx.AsyncClient]]:
    """A scripted cluster (`scripted.py`), and a client of its gateway's HTTP port."""
    async with (
        scripted_cluster(*scripts, http_listen="127.0.0.1:0", **settings) as cluster,
        http_client(cluster.gateway.http_url) as client,
    ):
        yield cluster, client


def http_client(url: str | None, **settings: Any) -> httpx.AsyncClient:
    """A client of an HTTP port; no proxy of the environment stands between."""
    assert url is not None, "the gateway has no HTTP port"
    return httpx.AsyncClient(base_url=url, timeout=30, trust_env=False, **settings)

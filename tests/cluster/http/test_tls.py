"""The HTTP port with certificates: the gateway's, as they are at each handshake, and clients' where asked for."""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_door import http_client
from scripted import served
from support.certificates import CLUSTER, CertificateFiles

from isthmus.cluster.frontend.gateway import Gateway
from isthmus.cluster.gateway_config import GatewayConfig
from isthmus.proto.security import credentials
from isthmus.proto.security.certificates import make_ca
from isthmus.proto.security.identity import Role
from isthmus.proto.security.settings import TlsFiles, security_of


@asynccontextmanager
async def gateway(folder: CertificateFiles, **tls: Any) -> AsyncIterator[Gateway]:
    """One with no workers: `/version` needs none."""
    files = TlsFiles(**folder.files("gateway"), **tls)
    config = GatewayConfig(http_listen="127.0.0.1:0", http={"tls": "on"}, preflight=False)  # pyright: ignore
    running = Gateway("127.0.0.1:0", served(), config=config, security=security_of(files, CLUSTER, "gateway"))
    await running.start()
    try:
        yield running
    finally:
        await running.stop()


async def version(url: str | None, ca: bytes, certificate: dict[str, str] | None = None) -> int:
    """The status of a request by a client that trusts this CA, and shows this certificate."""
    context = ssl.create_default_context(cadata=ca.decode())
    if certificate is not None:
        context.load_cert_chain(certificate["cert"], certificate["key"])
    async with http_client(url, verify=context) as client:
        return (await client.get("/version")).status_code


async def test_certificates_are_the_gateway_s_and_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "CHECK_S", 0.0)
    folder = CertificateFiles(tmp_path)
    async with gateway(folder) as running:
        url, old, new = running.http_url, folder.ca, make_ca(CLUSTER)
        assert url is not None and url.startswith("https://127.0.0.1:")
        assert await version(url, old.certificate) == 200
        with pytest.raises(httpx.ConnectError):
            await version(url, new.certificate)
        with pytest.raises(httpx.RemoteProtocolError):
            await version(url.replace("https", "http"), old.certificate)
        folder.trust(old, new)
        folder.issue_all(new)
        assert await version(url, new.certificate) == 200
        with pytest.raises(httpx.ConnectError):
            await version(url, old.certificate)


async def test_clients_show_certificates_where_they_are_asked_for(tmp_path: Path) -> None:
    folder = CertificateFiles(tmp_path)
    roles: tuple[Role, ...] = ("client", "admin", "decode", "supervisor")
    files = {role: folder.files(role) for role in roles}
    async with gateway(folder, client_certificates=True) as running:
        found = {role: await version(running.http_url, folder.ca.certificate, files[role]) for role in roles}
        assert found == {"client": 200, "admin": 200, "decode": 403, "supervisor": 403}
        with pytest.raises(httpx.HTTPError):
            await version(running.http_url, folder.ca.certificate)
        other = CertificateFiles(tmp_path / "other").files("client")
        with pytest.raises(httpx.HTTPError):
            await version(running.http_url, folder.ca.certificate, other)

"""The setting `tls`: which certificates a process uses, or that it talks in plain text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, SecretStr, Tag

from .certificates import KeyPair
from .credentials import Security
from .identity import Identity, Role
from .sources import Files, Known, Material, Memory
from .state import LOCAL, auto_source

_OFF = (False, "off", "false", "no")  # YAML reads `off` as False


class TlsFiles(BaseModel):
    """Certificates in files, which may be replaced at any time. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ca: Path = Field(description="CAs that are trusted, PEM; several while one follows another.")
    cert: Path = Field(description="The certificate of this process, PEM.")
    key: Path = Field(description="Its private key, PEM.")
    client_certificates: bool = Field(
        default=False, description="Whether the gateway's port for clients asks them for a certificate too."
    )


class TlsMaterial(BaseModel):
    """Certificates in memory, for a worker that is started by `isthmus up`; no file has them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ca_pem: str = Field(description="CAs that are trusted.")
    cert_pem: str = Field(description="The certificate of this process.")
    key_pem: SecretStr = Field(description="Its private key.")
    identities: tuple[str, ...] = Field(description="The names in the certificate: isthmus://CLUSTER/ROLE/NAME.")


def parse_word(value: Any) -> Any:
    """Of what may stand for `tls` in a file or variable: one of its words, or what is none. ValueError for a text that
    is neither."""
    if value is False or (isinstance(value, str) and value.lower() in _OFF):
        return "off"
    if isinstance(value, str | bool | int) and value != "auto":
        raise ValueError("allowed: auto, off (plain text), or files {ca: FILE, cert: FILE, key: FILE}")
    return value


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "word"
    if isinstance(value, TlsMaterial) or (isinstance(value, Mapping) and "key_pem" in value):
        return "memory"
    return "files"


_Word = Annotated[Literal["auto", "off"], Tag("word")]
_Files = Annotated[TlsFiles, Tag("files")]
_Memory = Annotated[TlsMaterial, Tag("memory")]
Tls = Annotated[_Word | _Files, Discriminator(_kind), BeforeValidator(parse_word)]
WorkerTls = Annotated[_Word | _Files | _Memory, Discriminator(_kind), BeforeValidator(parse_word)]


def security_of(
    tls: Literal["auto", "off"] | TlsFiles | TlsMaterial,
    cluster_id: str | None,
    *roles: Role,
    listening: tuple[str, ...] = (),
) -> Security | None:
    """What a process of these roles uses; None: plain text. `listening`: hosts that it listens on.

    InvalidRequest where its certificate cannot be used, is of another cluster, or is for none of `roles`.
    """
    if tls == "off":
        return None
    if tls == "auto":
        return Security(auto_source(cluster_id or LOCAL, roles[0], listening))
    if isinstance(tls, TlsFiles):
        security = Security(Files(tls.ca, tls.cert, tls.key), client_certificates=tls.client_certificates)
    else:
        assert isinstance(tls, TlsMaterial)
        pair = KeyPair(tls.cert_pem.encode(), tls.key_pem.get_secret_value().encode())
        known = Known(tuple(map(Identity.parse, tls.identities)))
        security = Security(Memory(Material(tls.ca_pem.encode(), pair), known))
    if cluster_id is not None:
        security.require_cluster(cluster_id)
    for role in roles:
        security.require(role)
    return security


def material_of(material: Material, identities: tuple[Identity, ...]) -> TlsMaterial:
    """Certificates as a setting that is handed to a worker."""
    assert material.pair is not None
    return TlsMaterial(
        ca_pem=material.ca.decode(),
        cert_pem=material.pair.certificate.decode(),
        key_pem=SecretStr(material.pair.key.decode()),
        identities=tuple(map(str, identities)),
    )

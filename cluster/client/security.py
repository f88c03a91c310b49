"""Which certificates a client uses: those that it names, or the ones of a cluster of the same user on this machine.

Nothing falls back to plain text: it is used where ISTHMUS_TLS=off says so, or the gateway itself has written down, in
the user's own state folder, that it talks so.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from ...proto.errors import InvalidRequest
from ...proto.rpc.addresses import is_own, parse_address
from ...proto.security.credentials import Security
from ...proto.security.identity import Role
from ...proto.security.settings import parse_word
from ...proto.security.sources import Files
from ...proto.security.state import LOCAL, Listening, auto_source, who_listens

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Certificates:
    """Files that a client names."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    @classmethod
    def of_environment(cls) -> "Certificates":
        """Those of ISTHMUS_CA, ISTHMUS_CERT and ISTHMUS_KEY."""
        found = {name: os.environ.get(f"ISTHMUS_{name.upper()}") for name in ("ca", "cert", "key")}
        return cls(**{name: Path(value) for name, value in found.items() if value})


def client_security(address: str, named: Certificates | None = None) -> Security | None:
    """What to dial a server at `address` with; None: plain text.

    `named`: by default those of the environment. On this machine those of the user's own cluster that listens there;
    where none does, it may come still. InvalidRequest where files are missing or no CA is known for the address.
    """
    named = named or Certificates.of_environment()
    if (named.cert is None) != (named.key is None) or (named.cert is not None and named.ca is None):
        raise InvalidRequest("a certificate needs its key and a CA: --ca, --cert and --key, or --ca alone")
    if named.ca is not None:
        return Security(Files(named.ca, named.cert, named.key), expects_host=True)
    if is_off():
        return None
    listening = _local(address)
    if listening is None:
        if (dialled := parse_address(address, to_dial=True)).is_any:
            raise InvalidRequest(
                f"{address} is where a server listens: dial {dialled._replace(host=LOOPBACK)}, or its host"
            )
        hint = "name its CA with --ca FILE (ISTHMUS_CA); ISTHMUS_TLS=off asks it in plain text"
        raise InvalidRequest(f"no CA is known for {address}: {hint}")
    return Security(auto_source(listening.cluster, "client")) if listening.cluster else None


def server_role(address: str) -> Role | None:
    """Whom a client expects at an address: a server of a cluster of this user, where one listens there. With a CA that
    is named, the host is expected that is dialled, and this changes nothing."""
    listening = _local(address)
    return listening.role if listening is not None else None


def is_off() -> bool:
    """Whether ISTHMUS_TLS says plain text; InvalidRequest where it says what is no setting of `tls`."""
    text = os.environ.get("ISTHMUS_TLS") or "auto"
    if text.startswith("{"):
        return False
    try:
        return parse_word(text) == "off"
    except ValueError as error:
        raise InvalidRequest(f"ISTHMUS_TLS is {text!r}: {error}") from None


def _local(address: str) -> Listening | None:
    dialled = parse_address(address, to_dial=True)
    if dialled.is_loopback:
        return who_listens(dialled.port) or Listening(LOCAL, "gateway")
    noted = who_listens(dialled.port) if is_own(dialled.host) else None
    return noted if noted is not None and noted.cluster else None

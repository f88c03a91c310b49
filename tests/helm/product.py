"""Command lines as the product's own parser reads them, and whom a client with them would dial."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import typer.main

from isthmus.cluster.cli.main import app
from isthmus.cluster.client.credentials import ApiKey
from isthmus.cluster.client.security import Certificates, client_security
from isthmus.proto.rpc.transport import Transport


def checked(words: list[str]) -> dict[str, Any]:
    """The parameters of a command line, as the real parser reads them. Raises what it raises."""
    command: Any = typer.main.get_command(app)
    while inner := getattr(command, "commands", None):
        assert words[0] in inner, f"no command {words[0]}"
        command, words = inner[words[0]], words[1:]
    return command.make_context(command.name, list(words)).params


@dataclass(frozen=True)
class Asking:
    """How a client's command would ask a gateway."""

    server: str
    encrypted: bool
    shows_certificate: bool
    key: str | None


def asking(words: list[str]) -> Asking:
    """That of a command for clients, with the variables of this process. Raises what keeps the command from asking."""
    given: Mapping[str, Any] = checked(words)
    files = Certificates(**{name: given[name] for name in ("ca", "cert", "key")})
    transport = Transport(client_security(given["server"], files))
    if given["api_key"] is not None:
        ApiKey(given["api_key"], over_plaintext=given["plaintext_key"]).check(given["server"], transport)
    return Asking(given["server"], transport.encrypted, files.cert is not None, given["api_key"])

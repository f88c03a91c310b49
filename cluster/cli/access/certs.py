"""`isthmus certs`: a CA of one's own, and certificates for hosts and roles."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..terminal import options as opt

if TYPE_CHECKING:
    from ....proto.security.certificates import Certificate

CA_FILE, CA_KEY_FILE = "ca.crt", "ca.key"
CERT_FILE, KEY_FILE = "tls.crt", "tls.key"
_CA_NAME = re.compile(r"CN=isthmus ([a-z0-9-]+) CA ")

certs_app = typer.Typer(
    no_args_is_help=True,
    help="Make and show certificates, for clusters over several hosts.",
    rich_markup_mode="rich",
)

Out = Annotated[Path, typer.Option("--out", "-o", file_okay=False, help="Folder to write to; nothing is overwritten.")]
CaFolder = Annotated[
    Path, typer.Option("--ca-dir", exists=True, file_okay=False, help="Folder of `isthmus certs init`.")
]


@certs_app.command("init")
def certs_init(
    cluster: Annotated[str, typer.Argument(help="Name of the cluster: cluster_id of its settings.")],
    out: Out = Path("certs"),
    days: Annotated[float, typer.Option(min=1, help="Until it ends.")] = 3650,
) -> None:
    """Make the certificate authority (CA) of a cluster: ca.crt for everybody, and ca.key, which stays where you are.

    [bold]Examples[/]

      isthmus certs init prod

      isthmus certs init prod --out /safe/place --days 730
    """
    from ....proto.security.certificates import make_ca
    from ....proto.security.identity import checked_cluster

    made = make_ca(checked_cluster(cluster), days)
    _write_new(out, {CA_FILE: made.certificate, CA_KEY_FILE: made.key})
    print(f"{out / CA_FILE}: the CA of cluster {cluster}; keep {out / CA_KEY_FILE} secret, no process needs it")


@certs_app.command("issue")
def certs_issue(
    out: Out,
    role: Annotated[
        list[str], typer.Option("--role", "-r", help="gateway, supervisor, prefill, decode, admin, client.")
    ],
    name: Annotated[str | None, typer.Option(help="Of the process; default: the name of the folder.")] = None,
    host: Annotated[list[str] | None, typer.Option(help="Name or address that clients dial; may be repeated.")] = None,
    ca_dir: CaFolder = Path("certs"),
    cluster: Annotated[str | None, typer.Option(help="Default: that of the CA.")] = None,
    days: Annotated[float, typer.Option(min=0.01, help="Until it ends.")] = 365,
) -> None:
    """Make a certificate for one or several roles: ca.crt, tls.crt and tls.key in a folder of its own.

    Workers that may change their role need both roles. Workers and supervisors are known by role, at any address; hosts
    are for a gateway whose clients are told its CA. localhost is always among them.

    [bold]Examples[/]

      isthmus certs issue --role prefill --role decode --out workers

      isthmus certs issue --role gateway --host llm.example.com --host 10.0.0.5 --out gateway

      isthmus certs issue --role admin --name maria --days 30 --out maria
    """
    from ....proto.security.certificates import KeyPair, describe, issue
    from ....proto.security.identity import SERVERS, identity

    ca = KeyPair(_read(ca_dir / CA_FILE), _read(ca_dir / CA_KEY_FILE))
    found = _CA_NAME.match(describe(ca.certificate)[0].subject)
    if cluster is None and found is None:
        raise typer.BadParameter(f"{ca_dir / CA_FILE} names no cluster: say it with --cluster")
    of = cluster or (found[1] if found else "")
    roles = [part.strip() for text in role for part in text.split(",")]
    identities = [identity(of, each, name or out.resolve().name) for each in dict.fromkeys(roles)]
    local = ["localhost", "127.0.0.1", "::1"] if any(each.role in SERVERS for each in identities) else []
    pair = issue(ca, identities, [*(host or ()), *local], days)
    _write_new(out, {CA_FILE: ca.certificate, CERT_FILE: pair.certificate, KEY_FILE: pair.key})
    print(f"{out / CERT_FILE}: {', '.join(map(str, identities))}, for {days:g} days")
    print(f"tls: {{ca: {out / CA_FILE}, cert: {out / CERT_FILE}, key: {out / KEY_FILE}}}")


@certs_app.command("show")
def certs_show(
    files: Annotated[
        list[Path] | None, typer.Argument(exists=True, help="Certificates, PEM; default: your own.")
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Show what certificates say: for whom they are, and when they end. Exits with 1 where one has ended.

    Without files those are shown that your processes on this machine use with tls: auto.

    [bold]Examples[/]

      isthmus certs show

      isthmus certs show gateway/tls.crt gateway/ca.crt

      isthmus certs show --json
    """
    from ....proto.security.certificates import describe
    from ....proto.security.state import state_folder

    paths = files or sorted(state_folder().glob("*/*.crt"))
    found = [(path, each) for path in paths for each in describe(_read(path))]
    if as_json:
        print(json.dumps([_as_dict(path, each) for path, each in found]))
    else:
        from ..terminal.columns import print_lines, table_lines

        rows = [
            (str(path), _holder(each), ", ".join(each.hosts), f"{each.not_after:%Y-%m-%d}", _left(each))
            for path, each in found
        ]
        if not rows:
            opt.say(f"no certificates in {state_folder()} yet: the first process of a cluster makes them")
        print_lines(table_lines(("file", "for", "hosts", "ends", "left"), rows))
    if any(each.days_left() < 0 for _, each in found):
        raise typer.Exit(1)


def _holder(certificate: "Certificate") -> str:
    if certificate.is_ca:
        return certificate.subject.removeprefix("CN=")
    return ", ".join(map(str, certificate.identities)) or certificate.subject


def _left(certificate: "Certificate") -> str:
    days = certificate.days_left()
    return "ended" if days < 0 else f"{days:.0f} days" if days >= 2 else f"{24 * days:.0f} hours"


def _as_dict(path: Path, certificate: "Certificate") -> dict[str, object]:
    return {
        "file": str(path),
        "identities": list(map(str, certificate.identities)),
        "hosts": list(certificate.hosts),
        "not_before": certificate.not_before.isoformat(),
        "not_after": certificate.not_after.isoformat(),
        "days_left": round(certificate.days_left(), 2),
        "is_ca": certificate.is_ca,
        "subject": certificate.subject,
        "issuer": certificate.issuer,
    }


def _read(path: Path) -> bytes:
    from ....proto.errors import InvalidRequest

    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from None


def _write_new(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes files of mode 0600 into a folder; AlreadyExists, and none is written, where there is one."""
    from ....proto.errors import AlreadyExists

    there = [str(folder / name) for name in files if (folder / name).exists()]
    if there:
        raise AlreadyExists(f"{there[0]} is there already; name another folder with --out")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, content in files.items():
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)

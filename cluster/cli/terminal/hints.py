"""What a person who has started a gateway may try next, from here and from other hosts."""

from typing import TYPE_CHECKING

from ... import defaults

if TYPE_CHECKING:
    from ...config import ClusterConfig


def hints(settings: "ClusterConfig", address: str) -> list[str]:
    """Lines for a gateway that is bound at `address`. May take some seconds where the resolver does not answer."""
    from ....proto.rpc.addresses import address_for_others, parse_address

    bound = parse_address(address)
    here = str(bound._replace(host=defaults.HOST)) if bound.is_any else address
    server = [] if here == defaults.SERVER else ["--server", here]
    key = ["--api-key", "@FILE"] if settings.gateway.access.guarded else []
    files = None if isinstance(settings.tls, str) else settings.tls
    here_ca = [] if files is None else ["--ca", str(files.ca)]
    own = [] if files is None or not files.client_certificates else ["--cert", "tls.crt", "--key", "tls.key"]
    lines = [" ".join(["try: isthmus generate --chat", *server, *here_ca, *own, *key, '"Why is the sky blue?"'])]
    if own:
        lines.append("tls.crt and tls.key are of `isthmus certs issue --role client`")
    if key:
        lines.append(f"@FILE is a file with {_credential(settings)}; ISTHMUS_API_KEY has the same")
    if not bound.is_loopback:
        there = str(address_for_others(bound)) if files is None else f"HOST:{bound.port}"
        options = ["--server", there, *_ca_options(settings), *own, *key]
        about = "" if files is None else f", and HOST one that {files.cert} is for"
        lines.append(f"from other hosts: {' '.join(options)}{_about_ca(settings)}{about}")
    return lines


def _credential(settings: "ClusterConfig") -> str:
    access = settings.gateway.access
    if access.keys_file is None:
        return "a token"
    return f"a key, as `isthmus keys add --keys-file {access.keys_file} --tenant NAME` prints it"


def _ca_options(settings: "ClusterConfig") -> list[str]:
    return [] if settings.tls == "off" else ["--ca", "ca.crt"]


def _about_ca(settings: "ClusterConfig") -> str:
    from ....proto.security.state import LOCAL, ca_of

    if settings.tls == "off":
        return ", with ISTHMUS_TLS=off: in plain text"
    file = ca_of(settings.named_cluster or LOCAL) if isinstance(settings.tls, str) else settings.tls.ca
    return f", where ca.crt is a copy of {file} of this host"

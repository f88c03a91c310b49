"""Who a process is: names in certificates, `isthmus://CLUSTER/ROLE/NAME`, and how they are read of a peer.

A certificate has one or several of them as URI names, and for each a DNS name `ROLE.CLUSTER.isthmus.internal`: whoever
dials inside the cluster expects that one, wherever the server runs. Workers have the same with `worker` for the role
besides, for those who give orders to a worker whatever its role is.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Final, Literal, NamedTuple, Self, get_args
from urllib.parse import quote, unquote

from ..errors import InvalidRequest, shown

Role = Literal["gateway", "supervisor", "prefill", "decode", "admin", "client"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)
SERVERS: Final[frozenset[Role]] = frozenset({"gateway", "supervisor", "prefill", "decode"})
WORKERS: Final[frozenset[Role]] = frozenset({"prefill", "decode"})
ServerName = Role | Literal["worker"]  # whom a channel expects

CLUSTER_PATTERN = r"^[a-z0-9][a-z0-9-]{0,31}$"
_SCHEME, _DOMAIN = "isthmus://", "isthmus.internal"
_DNS_NAME = re.compile(rf"(?P<role>{'|'.join(ROLES)})\.(?P<cluster>[a-z0-9][a-z0-9-]{{0,31}})\.{re.escape(_DOMAIN)}")
_MAX_NAME = 200  # of a process, as escaped in the URI


class Identity(NamedTuple):
    """One name of a process; `str` is the URI."""

    cluster: str
    role: Role
    name: str

    def __str__(self) -> str:
        return f"{_SCHEME}{self.cluster}/{self.role}/{quote(self.name, safe='')}"

    @classmethod
    def parse(cls, uri: str) -> Self:
        """InvalidRequest where it is none."""
        cluster, slash, rest = uri.removeprefix(_SCHEME).partition("/")
        role, second, name = rest.partition("/")
        known: Role | None = next((each for each in ROLES if each == role), None)
        if not uri.startswith(_SCHEME) or not slash or not second or known is None or not name or "/" in name:
            raise InvalidRequest(f"{shown(uri)} is not {_SCHEME}CLUSTER/ROLE/NAME with a role of {', '.join(ROLES)}")
        return cls(checked_cluster(cluster), known, unquote(name))


def identity(cluster: str, role: str, name: str) -> Identity:
    """From its parts; InvalidRequest where one cannot be in a certificate."""
    if not name or len(quote(name, safe="")) > _MAX_NAME:
        raise InvalidRequest(f"the name {shown(name)} is empty, or longer than {_MAX_NAME} characters in a certificate")
    if role not in ROLES:
        raise InvalidRequest(f"role {shown(role)}; allowed: {', '.join(ROLES)}")
    return Identity(checked_cluster(cluster), role, name)


def checked_cluster(cluster: str) -> str:
    """The same; InvalidRequest where no cluster can be called so."""
    if not re.fullmatch(CLUSTER_PATTERN, cluster):
        raise InvalidRequest(f"cluster {shown(cluster)}; allowed: a-z, 0-9 and -, at most 32 characters")
    return cluster


def server_name(role: ServerName, cluster: str) -> str:
    """The DNS name that a server of this role has in its certificate."""
    return f"{role}.{cluster}.{_DOMAIN}"


def server_names(identities: Iterable[Identity]) -> list[str]:
    """The DNS names that belong into a certificate with these identities, each once."""
    names = dict[str, None]()
    for each in identities:
        names[server_name(each.role, each.cluster)] = None
        if each.role in WORKERS:
            names[server_name("worker", each.cluster)] = None
    return list(names)


def identities_of(auth_context: Mapping[str, Iterable[bytes]]) -> list[Identity]:
    """Those in the certificate of a peer (`ServicerContext.auth_context()`); none where it has shown none."""
    uris, names, common = (_texts(auth_context, key) for key in ("peer_uri", "peer_dns", "x509_common_name"))
    return identities_by_names(uris, names, next(iter(common), ""))


def identities_by_names(uris: Iterable[str], dns_names: Iterable[str], common_name: str) -> list[Identity]:
    """Those of a certificate with these names.

    Some issuers (templates of Helm, for one) make no URI names. Of a certificate without one of ours the DNS names are
    read, in the exact form that servers are known by; its common name is then that of the process.
    """
    ours = [uri for uri in uris if uri.startswith(_SCHEME)]
    if not ours and common_name:
        found = (_DNS_NAME.fullmatch(name) for name in dns_names)
        ours = [f"{_SCHEME}{one['cluster']}/{one['role']}/{quote(common_name, safe='')}" for one in found if one]
    identities = list[Identity]()
    for uri in ours:
        try:
            identities.append(Identity.parse(uri))
        except InvalidRequest:
            continue  # a name of something else
    return identities


def _texts(auth_context: Mapping[str, Iterable[bytes]], key: str) -> list[str]:
    values = list[str]()
    for value in auth_context.get(key, ()):
        try:
            values.append(value.decode("ascii"))
        except UnicodeDecodeError:
            continue  # none of ours
    return values

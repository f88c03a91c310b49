"""Who may call what: one table, and the check that every call of a server with certificates passes.

The check fails closed: a method that is not in the table is refused, whoever calls it.
"""

from collections.abc import Collection, Mapping
from typing import Any, Final, Literal

from ..errors import PermissionDenied
from .identity import ROLES, Identity, Role, identities_of

ANYBODY: Final = "anybody"  # whoever reaches the port: ports that ask for a certificate let nobody in without
Caller = Role | Literal["anybody"]

_ALL: Final[frozenset[Caller]] = frozenset({ANYBODY, *ROLES})
_CLIENTS: Final[frozenset[Caller]] = frozenset({ANYBODY, "client", "admin"})
_KEEPERS: Final[frozenset[Caller]] = frozenset({"gateway", "supervisor"})
_ADMIN: Final[frozenset[Caller]] = frozenset({"admin"})


def _methods(service: str, names: str, callers: Collection[Caller]) -> dict[str, frozenset[Caller]]:
    return {f"/{service}/{name}": frozenset(callers) for name in names.split()}


CALLERS: Final[Mapping[str, frozenset[Caller]]] = {
    **_methods("isthmus.v1.Generation", "Generate GetModel ListModels", _CLIENTS),
    **_methods("isthmus.v1.Jobs", "SubmitJob GetJob ListJobs WatchJob GetResult CancelJob DeleteJob", _CLIENTS),
    **_methods(  # of a gateway too, for others' gateways
        "vllm.grpc.engine.VllmEngine",
        "Generate Embed HealthCheck FlushCache StartProfile StopProfile Abort GetModelInfo GetServerInfo GetLoads "
        "GetTokenizer SubscribeKvEvents",
        _CLIENTS,
    ),
    **_methods("isthmus.v1.Cluster", "GetStatus DrainWorker FlipWorker Scale Explain", _ADMIN),
    **_methods("isthmus.v1.Supervisor", "WatchWorkers", {"gateway", "admin"}),
    **_methods("isthmus.v1.Prefill", "Prefill", {"decode"}),
    **_methods("isthmus.v1.Decode", "Generate", {"gateway"}),
    **_methods("isthmus.v1.Worker", "GetReport Watch Drain Flip", _KEEPERS),
    **_methods("grpc.health.v1.Health", "Check Watch List", _ALL),
    **_methods("grpc.reflection.v1alpha.ServerReflection", "ServerReflectionInfo", _ALL),
    **_methods("grpc.reflection.v1.ServerReflection", "ServerReflectionInfo", _ALL),
}


class Authority:
    """The check of one server, of the cluster that its certificate names."""

    def __init__(self, cluster: str) -> None:
        self._cluster = cluster

    def check(self, method: str, context: Any) -> None:
        """PermissionDenied unless the peer of `context`, a `grpc.aio.ServicerContext`, may call `method`
        ("/isthmus.v1.Worker/Drain")."""
        self.check_identities(method, identities_of(context.auth_context()), context.peer())

    def check_identities(self, method: str, identities: Collection[Identity], peer: str) -> None:
        """The same for a peer whose certificate has these names."""
        allowed = CALLERS.get(method, frozenset())
        if not identities and ANYBODY in allowed:
            return
        if any(each.cluster == self._cluster and each.role in allowed for each in identities):
            return
        raise _refused(method, allowed, identities, peer)


def _refused(method: str, allowed: Collection[Caller], identities: Collection[Identity], peer: str) -> PermissionDenied:
    who = ", ".join(map(str, identities)) or "no certificate of a cluster"
    roles = " or ".join(sorted(set(allowed) - {ANYBODY})) or "nobody"
    error = PermissionDenied(f"{who} may not call {method}: that is for {roles} of this cluster")
    error.private = f"from {peer}"
    return error

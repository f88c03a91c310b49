"""NetworkPolicies as rules of nftables, at the node, where all that pods say to each other passes.

A pod that no policy selects for a direction is open in it; else what no rule allows is refused. Answers to what was
allowed pass. Refused is said with ICMP ("no route to host" at once), so that a test can tell it from a port at which
nobody listens; a network plugin would be silent instead.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .objects import NAMESPACE, Object, port_number, selects

if TYPE_CHECKING:
    from .network import Endpoint

REFUSED = "reject with icmpx admin-prohibited"
NAMESPACE_LABELS = {"kubernetes.io/metadata.name": NAMESPACE}


def policy_rules(policies: Sequence[Object], endpoints: Sequence["Endpoint"]) -> list[str]:
    """Chains for a table of family inet."""
    chains: list[str] = []
    jumps: list[str] = []
    for endpoint in endpoints:
        for direction, interface in (("Ingress", "oifname"), ("Egress", "iifname")):
            hits = [policy for policy in policies if _concerns(policy, endpoint, direction)]
            if not hits:
                continue
            allowed = [rule for policy in hits for rule in policy["spec"].get(direction.lower()) or ()]
            name = f"{direction.lower()}_{endpoint.link}"
            lines = [line for rule in allowed for line in _allow(rule, direction, endpoint, endpoints)]
            chains += [f"chain {name} {{", *lines, REFUSED, "}"]
            jumps.append(f"{interface} {endpoint.link} jump {name}")
    forward = ("type filter hook forward priority filter", "ct state established,related accept")
    return [*chains, "chain policies {", *forward, *jumps, "}"]


def _concerns(policy: Object, endpoint: "Endpoint", direction: str) -> bool:
    spec = policy["spec"]
    types = spec.get("policyTypes") or (["Ingress", "Egress"] if "egress" in spec else ["Ingress"])
    return direction in types and selects(spec.get("podSelector"), endpoint.labels)


def _allow(rule: Object, direction: str, pod: "Endpoint", all_pods: Iterable["Endpoint"]) -> Iterator[str]:
    """A rule of nftables for each peer and port of one rule of a policy. A port's name is looked up in the receiver."""
    side = "saddr" if direction == "Ingress" else "daddr"
    for peer in rule.get("from" if direction == "Ingress" else "to") or [None]:
        if peer and "ipBlock" in peer:
            block = peer["ipBlock"]
            others = f" ip {side} != {{ {', '.join(block['except'])} }}" if block.get("except") else ""
            yield from (f"ip {side} {block['cidr']}{others} {port} return" for port in _ports(rule, None, pod))
            continue
        ends = [end for end in all_pods if peer is None or _is_peer(peer, end)]
        if peer is None and direction == "Ingress":
            yield from (f"{port} return" for port in _ports(rule, None, pod))
            continue
        for end in ends:
            receiver = pod if direction == "Ingress" else end
            yield from (f"ip {side} {end.address} {port} return" for port in _ports(rule, receiver, receiver))


def _is_peer(peer: Object, endpoint: "Endpoint") -> bool:
    """Without a namespaceSelector of the policy's own namespace, in which all pods here are."""
    if "namespaceSelector" in peer and not selects(peer["namespaceSelector"], NAMESPACE_LABELS):
        return False
    return selects(peer.get("podSelector"), endpoint.labels)


def _ports(rule: Object, receiver: "Endpoint | None", fallback: "Endpoint") -> Iterator[str]:
    """Of one rule, as matches; all of them where it names none. A name that the receiver has not allows nothing."""
    for port in rule.get("ports") or [None]:
        if port is None:
            yield ""
            continue
        protocol = port.get("protocol", "TCP").lower()
        if "port" not in port:
            yield f"meta l4proto {protocol}"
            continue
        number = _number(port["port"], (receiver or fallback).pod)
        if number is not None:
            yield f"{protocol} dport {number}" + (f"-{port['endPort']}" if "endPort" in port else "")


def _number(port: Any, pod: Object) -> int | None:
    try:
        return port_number(port, pod)
    except KeyError:
        return None

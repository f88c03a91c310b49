"""Rules for policies, budgets and monitors: whom they find, and whether that works with KubeRay's pods."""

import json
import re
from collections.abc import Iterator

from .objects import Cluster, Object, Pod, where

CLIENT_PORTS = frozenset({50051, 8000})  # the only ones that anybody may reach: gRPC and HTTP
_LABELS = re.compile(r'\{[^}]*\}|\b(?:by|without) \([^)]*\)|"[^"]*"')  # beside the metrics of an expression
_METRIC = re.compile(r"\b(?:ray|kube|kubelet|isthmus)_\w+")


def problems(cluster: Cluster) -> Iterator[str]:
    policies = cluster.of("NetworkPolicy")
    for each in policies:
        for found in _policy(cluster, each):
            yield f"{where(each)}: {found}"
    if policies:
        for pod in cluster.pods:
            served = pod.owner["kind"] in ("RayCluster", "Deployment")
            if served and not any(_finds(each["spec"]["podSelector"], pod) for each in policies):
                yield f"{pod.where}: no policy holds for it: every port is open"
    for pod in cluster.pods:
        if pod.role == "test" and not _reaches_gateways(cluster, pod):
            yield f"{pod.where}: no policy lets it reach the gateways that it tests"
    for each in cluster.of("Service"):
        for found in _shut(cluster, each):
            yield f"{where(each)}: {found}"
    for each in cluster.of("PodDisruptionBudget"):
        for found in _budget(cluster, each):
            yield f"{where(each)}: {found}"
    for each in cluster.of("PodMonitor"):
        pods = cluster.selected(each["spec"]["selector"]["matchLabels"])
        if not pods:
            yield f"{where(each)}: its selector finds no pod"
        for endpoint in each["spec"]["podMetricsEndpoints"]:
            for pod in pods:
                if endpoint["port"] not in pod.ports():
                    yield f"{where(each)}: {pod.name} has no port {endpoint['port']}"
    yield from _metrics(cluster)


def _policy(cluster: Cluster, each: Object) -> Iterator[str]:
    spec = each["spec"]
    pods = [pod for pod in cluster.pods if _finds(spec["podSelector"], pod)]
    if not pods:
        yield "its selector finds no pod"
    if "Ingress" not in spec.get("policyTypes", ()):
        yield "is not for what comes in"
    for rule in spec.get("ingress", ()):
        ports = _ranges(rule)
        if not ports:
            yield "a rule opens every port"
        for number in (number for port in ports for number in (port[0], port[-1])):
            if not all(pod.has_port(number) for pod in pods):
                yield f"opens port {number}, where nothing listens"
        peers = rule.get("from")
        if not peers and not (ports and {number for port in ports for number in port} <= CLIENT_PORTS):
            yield "a rule lets everybody in at other ports than those of clients"
        for peer in peers or ():
            yield from _peer(cluster, peer)


def _ranges(rule: Object) -> list[range]:
    """The ports that a rule opens; none where it opens all."""
    return [range(port["port"], port.get("endPort", port["port"]) + 1) for port in rule.get("ports", ())]


def _shut(cluster: Cluster, service: Object) -> Iterator[str]:
    """Ports of a Service that the policies of its pods open for nobody."""
    for pod in cluster.selected(service["spec"]["selector"]):
        policies = [each["spec"] for each in cluster.of("NetworkPolicy") if _finds(each["spec"]["podSelector"], pod)]
        opened = [_ranges(rule) for spec in policies for rule in spec.get("ingress", ())]
        for port in service["spec"]["ports"] if policies else ():
            target = port.get("targetPort", port["port"])
            number = pod.ports().get(target, 0) if isinstance(target, str) else target
            if not any(not ranges or any(number in found for found in ranges) for ranges in opened):
                yield f"leads to port {target}, which no policy opens"


def _peer(cluster: Cluster, peer: Object) -> Iterator[str]:
    if not peer or peer.get("namespaceSelector") == {} or peer.get("ipBlock", {}).get("cidr") in ("0.0.0.0/0", "::/0"):
        yield "a peer is everybody"
        return
    selector = peer.get("podSelector")
    if selector is not None and "namespaceSelector" not in peer:
        if not selector.get("matchLabels"):
            yield "a peer is every pod of the namespace"
        elif not any(_finds(selector, pod) for pod in cluster.pods):
            yield f"a peer is no pod: {selector['matchLabels']}"


def _reaches_gateways(cluster: Cluster, pod: Pod) -> bool:
    gateways = [each for each in cluster.pods if each.role == "gateway"]
    policies = [
        each["spec"]
        for each in cluster.of("NetworkPolicy")
        if any(_finds(each["spec"]["podSelector"], gateway) for gateway in gateways)
    ]
    rules = [rule for spec in policies for rule in spec.get("ingress", ())]
    selectors = [peer.get("podSelector") for rule in rules for peer in rule.get("from", ())]
    everybody = not policies or any("from" not in rule for rule in rules)
    return everybody or any(selector is not None and _finds(selector, pod) for selector in selectors)


def _finds(selector: Object, pod: Pod) -> bool:
    return selector.get("matchLabels", {}).items() <= pod.labels.items()


def _budget(cluster: Cluster, each: Object) -> Iterator[str]:
    spec = each["spec"]
    pods = [pod for pod in cluster.pods if _finds(spec["selector"], pod)]
    if not pods:
        yield "its selector finds no pod"
    if {pod.owner["kind"] for pod in pods} == {"Deployment", "RayCluster"}:
        yield "counts pods of two kinds of owners"
    least = spec.get("minAvailable")
    of_ray = [pod for pod in pods if pod.group is not None]
    if of_ray and (not isinstance(least, int) or "maxUnavailable" in spec):
        yield "of KubeRay's pods only a number in minAvailable works: any other one blocks every eviction"
        return
    there = sum(pod.group["minReplicas"] for pod in of_ray if pod.group and not pod.is_head)
    if of_ray and isinstance(least, int) and least >= max(1, there):
        yield f"minAvailable {least} of {there} pods blocks every eviction"


def _metrics(cluster: Cluster) -> Iterator[str]:
    """Rules and dashboards ask for metrics that somebody exports."""
    asked: list[tuple[str, str]] = []
    for each in cluster.of("PrometheusRule"):
        rules = [rule for group in each["spec"]["groups"] for rule in group["rules"]]
        asked += [(where(each), rule["expr"]) for rule in rules]
        for rule in rules:
            if not rule.get("annotations", {}).get("summary"):
                yield f"{where(each)}: {rule['alert']} does not say what is wrong"
    for each in cluster.of("ConfigMap"):
        for name, text in each.get("data", {}).items():
            if name.endswith(".json"):
                panels = json.loads(text)["panels"]
                asked += [(where(each), target["expr"]) for panel in panels for target in panel["targets"]]
    for asker, expression in asked:
        for name in _METRIC.findall(_LABELS.sub("", expression)):
            if name not in cluster.metrics:
                yield f"{asker}: nobody exports the metric {name}"

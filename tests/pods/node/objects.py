"""The rendered objects of a chart, by kind and name, and what refers to them: labels, selectors, values, quantities.

An object is the plain dictionary of its YAML. Everything is of one Kubernetes namespace, `NAMESPACE`.
"""

import base64
import math
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

import yaml

Object = dict[str, Any]

NAMESPACE = "isthmus"
_SUFFIXES = {"m": Decimal("0.001"), "": Decimal(1)} | {
    name: Decimal(base) ** power
    for base, names in ((1000, ("k", "M", "G", "T")), (1024, ("Ki", "Mi", "Gi", "Ti")))
    for power, name in enumerate(names, start=1)
}


def quantity(text: Any) -> Decimal:
    """A Kubernetes quantity in its base unit: "500m" is 0.5, "2Gi" is 2147483648."""
    found = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(text))
    assert found, f"no quantity: {text!r}"
    return Decimal(found[1]) * _SUFFIXES[found[2]]


def selects(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """Whether a label selector (matchLabels, matchExpressions) hits; an empty one hits everything."""
    selector = selector or {}
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    return all(_holds(expression, labels) for expression in selector.get("matchExpressions") or ())


def _holds(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    value, values = labels.get(expression["key"]), expression.get("values", ())
    match expression["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case other:
            raise AssertionError(f"no operator of a selector: {other}")


class Objects:
    """What `helm template` printed, and what an operator or a person added."""

    def __init__(self, rendered: str = "") -> None:
        self._objects = [found for found in yaml.safe_load_all(rendered) if found]

    def add(self, *objects: Object) -> None:
        self._objects += objects

    def of(self, kind: str) -> Iterator[Object]:
        return (found for found in self._objects if found["kind"] == kind)

    def get(self, kind: str, name: str) -> Object:
        """KeyError where there is none: what refers to it could not start either."""
        for found in self.of(kind):
            if found["metadata"]["name"] == name:
                return found
        raise KeyError(f"no {kind} {name} in {[found['metadata']['name'] for found in self.of(kind)]}")

    def data(self, kind: str, name: str) -> dict[str, bytes]:
        """The keys of a ConfigMap or Secret."""
        found = self.get(kind, name)
        texts = {**found.get("data", {}), **found.get("stringData", {})} if kind == "ConfigMap" else {}
        if kind == "Secret":
            coded = {key: base64.b64decode(value) for key, value in (found.get("data") or {}).items()}
            return coded | {key: value.encode() for key, value in (found.get("stringData") or {}).items()}
        coded = {key: base64.b64decode(value) for key, value in (found.get("binaryData") or {}).items()}
        return coded | {key: value.encode() for key, value in texts.items()}


def environment(container: Object, pod: Object, objects: Objects, address: str) -> dict[str, str]:
    """The variables that a container gets, with `$(NAME)` of earlier ones put in; a missing key is a KeyError."""
    values: dict[str, str] = {}
    for source in container.get("envFrom") or ():
        kind = "ConfigMap" if "configMapRef" in source else "Secret"
        name = source["configMapRef" if kind == "ConfigMap" else "secretRef"]["name"]
        values |= {source.get("prefix", "") + key: text.decode() for key, text in objects.data(kind, name).items()}
    for entry in container.get("env") or ():
        if "valueFrom" not in entry:
            values[entry["name"]] = expanded(entry.get("value") or "", values)
            continue
        try:
            values[entry["name"]] = _value_from(entry["valueFrom"], container, pod, objects, address)
        except KeyError:
            if not next(iter(entry["valueFrom"].values())).get("optional"):
                raise
    return values


def _value_from(source: Object, container: Object, pod: Object, objects: Objects, address: str) -> str:
    match source:
        case {"fieldRef": {"fieldPath": path}}:
            return field(pod, path, address)
        case {"secretKeyRef": {"name": name, "key": key}}:
            return objects.data("Secret", name)[key].decode()
        case {"configMapKeyRef": {"name": name, "key": key}}:
            return objects.data("ConfigMap", name)[key].decode()
        case {"resourceFieldRef": {"resource": resource, **rest}}:
            kind, _, name = resource.partition(".")
            amount = quantity(container["resources"][kind][name]) / quantity(rest.get("divisor") or 1)
            return str(math.ceil(amount))
        case _:
            raise AssertionError(f"no source of a variable: {source}")


def field(pod: Object, path: str, address: str) -> str:
    """A field of a pod, as `fieldRef` names it."""
    if path in ("status.podIP", "status.podIPs"):
        return address
    if found := re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path):
        return pod["metadata"].get(found[1], {}).get(found[2], "")
    known = {
        "metadata.name": pod["metadata"]["name"],
        "metadata.namespace": NAMESPACE,
        "metadata.uid": pod["metadata"].get("uid", pod["metadata"]["name"]),
        "spec.serviceAccountName": pod["spec"].get("serviceAccountName", "default"),
        "spec.nodeName": "node",
    }
    return known[path]


def expanded(text: str, values: Mapping[str, str]) -> str:
    """With each `$(NAME)` that is known; `$$` is one dollar sign."""

    def put(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else values.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)", put, text)


def port_number(port: Any, pod: Object) -> int:
    """A port of a pod by number or by the name that one of its containers gives it, sidecars among them."""
    if isinstance(port, int):
        return port
    for container in [*pod["spec"]["containers"], *(pod["spec"].get("initContainers") or ())]:
        for declared in container.get("ports") or ():
            if declared.get("name") == port:
                return declared["containerPort"]
    raise KeyError(f"no container of {pod['metadata']['name']} has a port called {port}")

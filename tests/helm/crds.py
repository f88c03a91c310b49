"""Custom resources against their CRD, as an API server would: unknown fields are refused too, CEL rules hold."""

import copy
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import celpy
import celpy.adapter
import jsonschema
import yaml
from celpy.evaluation import CELEvalError

from .charts import ROOT, Object
from .others import SCHEMAS

# Files <group>_<plural>.yaml, as their projects publish them. They are not kept here.
FOLDER = Path(os.environ.get("CRDS") or ROOT.parent / "shared" / "crds")
MISSING = f"NOT TESTED: custom resources. There is no folder of CRDs at {FOLDER}; CRDS names another"

Schema = dict[str, Any]


@cache
def schemas() -> dict[tuple[str, str], Schema]:
    """The tightened schema of each kind, by apiVersion and kind; those written by hand where no CRD is here."""
    found: dict[tuple[str, str], Schema] = {key: tightened(schema) for key, schema in SCHEMAS.items()}
    for file in sorted(FOLDER.glob("*.yaml")):
        definition = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
        for version in definition["versions"]:
            if version["served"]:
                key = f"{definition['group']}/{version['name']}", definition["names"]["kind"]
                found[key] = tightened(version["schema"]["openAPIV3Schema"])
    return found


def problems(each: Object) -> list[str]:
    """What is wrong with a custom resource. KeyError for one whose CRD is not here."""
    schema = schemas()[each["apiVersion"], each["kind"]]
    each = _with_defaults(each, schema)
    errors = jsonschema.Draft7Validator(schema).iter_errors(each)
    found = [f"{'.'.join(map(str, error.path))}: {error.message}" for error in errors]
    return [*found, *_lists(each, schema, ""), *_cel(each, schema, "")]


def tightened(schema: Schema) -> Schema:
    """As an API server reads it, in words of JSON schema, and closed against unknown fields."""
    schema = copy.copy(schema)
    properties: dict[str, Any] | None = schema.get("properties")
    if properties is not None:
        schema["properties"] = {name: tightened(value) for name, value in properties.items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema:
            schema["additionalProperties"] = False
        schema["required"] = [name for name in schema.get("required", ()) if "default" not in properties.get(name, {})]
    others = schema.get("additionalProperties")
    if isinstance(others, dict):
        schema["additionalProperties"] = tightened(others)
    if isinstance(schema.get("items"), dict):
        schema["items"] = tightened(schema["items"])
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
        schema["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if schema.get("nullable") and "type" in schema:
        schema["type"] = [schema["type"], "null"]
    return schema


def _with_defaults(value: Any, schema: Schema) -> Any:
    """A value as an API server stores it."""
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        return [_with_defaults(inner, schema["items"]) for inner in value]
    if not isinstance(value, dict):
        return value
    properties = schema.get("properties", {})
    defaults = {name: inner["default"] for name, inner in properties.items() if "default" in inner}
    return {name: _with_defaults(inner, properties.get(name, {})) for name, inner in (defaults | value).items()}


def _inside(value: Any, schema: Schema, path: str) -> Iterator[tuple[Any, Schema, str]]:
    """The parts of a value, each with its schema."""
    if isinstance(value, dict):
        others = schema.get("additionalProperties")
        for name, inner in value.items():
            found = schema.get("properties", {}).get(name, others)
            if isinstance(found, dict):
                yield inner, found, f"{path}.{name}"
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        yield from ((inner, schema["items"], f"{path}[{number}]") for number, inner in enumerate(value))


def _lists(value: Any, schema: Schema, path: str) -> Iterator[str]:
    """Lists that are maps have each key once, those that are sets each entry."""
    if isinstance(value, list):
        kind, keys = schema.get("x-kubernetes-list-type"), schema.get("x-kubernetes-list-map-keys", ())
        if kind == "map":
            defaults = {key: schema["items"]["properties"][key].get("default") for key in keys}
            names = [tuple(entry.get(key, defaults[key]) for key in keys) for entry in value]
        else:
            names = [str(entry) for entry in value] if kind == "set" else []
        if len(set(names)) != len(names):
            yield f"{path}: two entries are the same by {', '.join(keys) or 'value'}"
    for inner in _inside(value, schema, path):
        yield from _lists(*inner)


def _cel(value: Any, schema: Schema, path: str) -> Iterator[str]:
    """Rules of the CRD. Those that compare with what was there before need an object that was."""
    for rule in schema.get("x-kubernetes-validations", ()):
        if "oldSelf" not in rule["rule"] and not _holds(rule["rule"], value):
            yield f"{path}: {rule.get('message', rule['rule'])}"
    for inner in _inside(value, schema, path):
        yield from _cel(*inner)


@cache
def _program(rule: str) -> celpy.Runner:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))


def _holds(rule: str, value: Any) -> bool:
    try:
        return bool(_program(rule).evaluate({"self": celpy.adapter.json_to_cel(value)}))
    except CELEvalError:  # of an expression that an API server would refuse too
        return False

"""Objects of Kubernetes itself against the strict schemas of one of its versions."""

import json
import re
from functools import cache
from importlib.resources import files
from typing import Any

import jsonschema
from jsonschema.protocols import Validator
from kubernetes_validate import latest_version, utils
from referencing import Registry, Resource

from .charts import Object

OLDEST, NEWEST = "1.29", utils.major_minor(latest_version())


def problems(each: Object, version: str) -> list[str]:
    """What is wrong with an object. FileNotFoundError for a kind that this version does not have."""
    errors = _validator(each["apiVersion"], each["kind"], version).iter_errors(each)
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in errors]


@cache
def _validator(api_version: str, kind: str, version: str) -> Validator:
    """That of `kubernetes_validate.validate`, which reads all definitions anew for each object."""
    name = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    schema = json.loads((_folder(version) / f"{kind.lower()}-{name}.json").read_text())
    registry: Registry[Any] = Resource.from_contents(schema) @ _definitions(version)
    return jsonschema.Draft202012Validator(schema, registry=registry)


@cache
def _definitions(version: str) -> "Registry[Any]":
    contents = json.loads((_folder(version) / "_definitions.json").read_text())
    return Resource.from_contents(contents) @ Registry()


def _folder(version: str) -> Any:
    (full,) = {each for each in utils.all_versions() if utils.major_minor(each) == version}
    return files("kubernetes_validate") / "kubernetes-json-schema" / f"v{full}-local-strict"

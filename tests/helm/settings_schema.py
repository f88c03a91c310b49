"""The part of the chart's schema that is `settings`, from the product's own settings: run this file to write it anew.

It is as wide as the settings file: names of settings, types and limits. What the product says beside that (codecs,
addresses, settings that go together) pods say at their start. A setting of the chart's own is in it too, because the
chart says more clearly than a schema what to set instead.
"""

import json
from pathlib import Path
from typing import Any

from isthmus.cluster.config import ClusterConfig

FILE = Path(__file__).parents[2] / "helm" / "values.schema.json"
PREFIX = "settings."  # of the parts in $defs that are the settings'
_IN_MEMORY = "TlsMaterial"  # no file has it
_LIMITS = ("enum", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_SIZES = ("minLength", "maxLength", "minItems", "maxItems", "propertyNames")
Schema = dict[str, Any]


def written(values: Schema) -> Schema:
    """The chart's schema with the settings of now."""
    made = ClusterConfig.model_json_schema()
    others = {name: part for name, part in values["$defs"].items() if not name.startswith(PREFIX)}
    own = {f"{PREFIX}{name}": _part(part) for name, part in made["$defs"].items() if name != _IN_MEMORY}
    properties = {**values["properties"], "settings": _part(made)}
    return {**values, "properties": properties, "$defs": {**others, **own}}


def text(values: Schema) -> str:
    return json.dumps(values, indent=2) + "\n"


def _part(part: Schema) -> Schema:
    """What Helm has to know of it: nothing is required, because the chart's own settings come beside it, and None sets
    nothing."""
    if "$ref" in part:
        return {"$ref": part["$ref"].replace("#/$defs/", f"#/$defs/{PREFIX}")}
    choices = [choice for choice in part.get("anyOf", part.get("oneOf", ())) if not _is_in_memory(choice)]
    if choices:
        return _either([_part(choice) for choice in choices])
    found = {key: part[key] for key in ("type", *_LIMITS, *_SIZES) if key in part}
    if {"on", "off"} <= {*part.get("enum", ())}:
        found |= {"type": ["string", "boolean"], "enum": [*part["enum"], True, False]}  # as YAML reads on and off
    if "properties" in part:
        found |= {"additionalProperties": False, "properties": {k: _part(v) for k, v in part["properties"].items()}}
    elif isinstance(part.get("additionalProperties"), dict):
        found["additionalProperties"] = _part(part["additionalProperties"])
    if part.get("type") == "array":
        found |= {"type": ["array", "string"], "items": _part(part["items"])}  # a text has commas between its parts
    if part.get("title") == "Tenant Weights":
        found["type"] = ["object", "string"]
    return found


def _either(choices: list[Schema]) -> Schema:
    """One of several. A value or none is said without `anyOf`, whose errors name every choice."""
    values = [choice for choice in choices if choice != {"type": "null"}]
    if any("off" in choice.get("enum", ()) for choice in choices):
        choices = [*choices, {"type": "boolean"}]  # as YAML reads off
    if len(values) == 1 and len(choices) == 2 and isinstance(values[0].get("type"), str):
        return {**values[0], "type": [values[0]["type"], "null"]}
    return {"anyOf": choices}


def _is_in_memory(choice: Schema) -> bool:
    return choice.get("$ref", "").endswith(f"/{_IN_MEMORY}")


if __name__ == "__main__":
    FILE.write_text(text(written(json.loads(FILE.read_text()))))

"""JSON schemas to try structured output with: random ones, and hard ones by hand."""

from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis_jsonschema import from_schema

Schema = dict[str, Any]

_NAME: Schema = {"type": "string", "pattern": "^[a-zé ]{1,6}$"}
_COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 4}


def _object(**properties: Any) -> Schema:
    """A schema of objects of which the first property is required, and nothing beside them allowed."""
    required = [next(iter(properties))]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _leaf(**keywords: Any) -> st.SearchStrategy[Schema]:
    """Schemas whose first keyword is there, and of the others some: values are drawn from schemas of them."""
    drawn = {name: from_schema(schema) for name, schema in keywords.items()}
    first = next(iter(drawn))
    return st.fixed_dictionaries({first: drawn.pop(first)}, optional=drawn)


_SCALARS: Schema = {
    "anyOf": [
        {"type": ["null", "boolean"]},
        {"type": "integer", "minimum": -(2**53), "maximum": 2**53},
        {"type": "string", "maxLength": 8},
    ]
}
_LEAVES = st.one_of(
    _leaf(type={"enum": ["null", "boolean", "string", "number", "integer"]}),
    _leaf(
        type={"enum": ["integer", "number"]},
        minimum={"type": "integer", "minimum": -1000, "maximum": 0},
        maximum={"type": "integer", "minimum": 1, "maximum": 10**12},
    ),
    _leaf(type={"const": "integer"}, multipleOf={"type": "integer", "minimum": 1, "maximum": 20}),
    _leaf(type={"const": "string"}, minLength=_COUNT, maxLength={"type": "integer", "minimum": 4, "maximum": 12}),
    _leaf(pattern={"enum": ["^a+b?$", "[0-9]{2}", "^(x|yz)*$", "é"]}, type={"const": "string"}),
    _leaf(format={"enum": ["date", "time", "date-time", "uuid", "ipv4", "email"]}, type={"const": "string"}),
    _leaf(enum={"type": "array", "items": _SCALARS, "minItems": 1, "maxItems": 5}),
    _leaf(const=_SCALARS),
)


def _grown(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    """Schemas of arrays, objects and alternatives of others."""
    names = st.lists(from_schema(_NAME), min_size=1, max_size=4, unique=True)
    arrays = st.builds(
        lambda items, least, more: {"type": "array", "items": items, "minItems": least, "maxItems": least + more},
        inner,
        from_schema(_COUNT),
        from_schema(_COUNT),
    )
    tuples = st.builds(
        lambda items: {"type": "array", "prefixItems": items, "minItems": len(items), "items": False},
        st.lists(inner, min_size=1, max_size=3),
    )
    objects = st.builds(
        lambda names, values, required, more: {
            "type": "object",
            "properties": dict(zip(names, values, strict=False)),
            "required": names[: min(required, len(values))],
            "additionalProperties": more,
        },
        names,
        st.lists(inner, min_size=4, max_size=4),
        from_schema(_COUNT),
        st.one_of(st.just(False), inner),
    )
    alternatives = st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3))
    return st.one_of(arrays, tuples, objects, alternatives)


def random_schemas(count: int, first_seed: int) -> list[Schema]:
    """So many schemas, the same ones for a seed."""
    drawn: list[Schema] = []

    @seed(first_seed)
    @settings(
        max_examples=count,
        database=None,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    @given(st.recursive(_LEAVES, _grown, max_leaves=6))
    def draw(schema: Schema) -> None:
        drawn.append(schema)

    draw()
    return drawn


_TREE = {
    "$defs": {
        "node": _object(
            value={"type": "integer"}, children={"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2}
        )
    },
    "$ref": "#/$defs/node",
}
_EXPRESSION = {
    "$defs": {
        "e": {
            "anyOf": [
                {"type": "integer"},
                _object(op={"enum": ["+", "*"]}, a={"$ref": "#/$defs/e"}, b={"$ref": "#/$defs/e"}),
            ]
        }
    },
    "$ref": "#/$defs/e",
}

HARD_SCHEMAS: dict[str, Schema] = {
    "tree": _TREE,
    "expression": _EXPRESSION,
    "list that refers to itself": {"anyOf": [{"type": "null"}, _object(next={"$ref": "#"})]},
    "enum of strings": {"enum": ["red", "green", "blue", "greenish"]},
    "enum of all kinds": {"enum": [None, True, 0, -1.5, "", "null", [1, "a"], {"k": None}]},
    "enum with control tokens": {"enum": ["<eos>", "<bos>", "<|im_end|>", "</s>"]},
    "unicode in names": _object(**{"größe": {"type": "integer"}, "名前": {"type": "boolean"}, "😀": {"type": "null"}}),
    "unicode in values": {"enum": ["é", "e\u0301", "日本", "😀", "\u2028", "\ufeff"]},
    "escapes": {"enum": ['"', "\\", "\n\t", "\u0001", "/", "\u007f"]},
    "escaped names": _object(**{'a"b': {"type": "null"}, "c\\d": {"type": "null"}, "e\nf": {"type": "null"}}),
    "empty name": _object(**{"": {"type": "integer"}}),
    "large constant": {"enum": [9007199254740992, -9007199254740991, 123456789012345]},
    "large bounds": {"type": "integer", "minimum": 9007199254740000, "maximum": 9007199254740992},
    "negative bounds": {"type": "integer", "minimum": -1000000007, "maximum": -999999937},
    "open bounds": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 1001},
    "fractions": {"type": "number", "minimum": 0.125, "maximum": 0.375},
    "multiple and bounds": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 9999},
    "digits": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{4}$"},
    "pattern inside": {"type": "string", "pattern": "ab|cd", "maxLength": 12},
    "unicode pattern": {"type": "string", "pattern": "^[\u03b1-\u03c9]{2,5}$"},
    "date-time": {"type": "string", "format": "date-time"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv6": {"type": "string", "format": "ipv6"},
    "email": {"type": "string", "format": "email", "maxLength": 30},
    "lengths in characters": {"type": "string", "minLength": 3, "maxLength": 5},
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3},
    "names by pattern": {
        "type": "object",
        "patternProperties": {"^i_": {"type": "integer"}, "^b_": {"type": "boolean"}},
        "additionalProperties": False,
    },
    "nothing else": _object(a={"type": "integer"}, b={"type": "string", "maxLength": 3}),
    "all required": {**_object(a={"type": "null"}, b={"type": "null"}), "required": ["b", "a"]},
    "nothing at all": {"type": "object", "additionalProperties": False},
    "no elements": {"type": "array", "maxItems": 0},
    "matrix": {
        "type": "array",
        "minItems": 2,
        "maxItems": 2,
        "items": {"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": "integer", "maximum": 9}},
    },
    "tuple": {"type": "array", "prefixItems": [{"const": 1}, {"type": "boolean"}], "items": False, "minItems": 2},
    "deep": {"type": "array", "items": {"type": "array", "items": {"type": "array", "items": {"type": "null"}}}},
    "anyOf with a tag": {
        "anyOf": [
            _object(kind={"const": "circle"}, r={"type": "number"}),
            _object(kind={"const": "box"}, w={"type": "integer"}, h={"type": "integer"}),
        ]
    },
    "oneOf of types": {"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 4}]},
    "oneOf with a tag": {
        "oneOf": [_object(t={"const": "a"}, v={"type": "integer"}), _object(t={"const": "b"}, v={"type": "boolean"})]
    },
    "allOf": {"allOf": [{"type": "integer", "minimum": 10}, {"maximum": 20}, {"multipleOf": 5}]},
    "several types": {"type": ["integer", "null", "boolean"]},
    "reference with siblings": {"$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n", "minimum": 5, "maximum": 50},
}

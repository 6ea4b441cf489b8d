"""A schema of any dialect means, rewritten, what it meant: judged by the jsonschema library."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for

from stateful_sglang.grammar.prepare import grammar_schema

D4 = "http://json-schema.org/draft-04/schema#"
D6 = "http://json-schema.org/draft-06/schema#"
D7 = "http://json-schema.org/draft-07/schema#"
D2019 = "https://json-schema.org/draft/2019-09/schema"
D2020 = "https://json-schema.org/draft/2020-12/schema"
TREE = {
    "$id": "https://example.com/tree",
    "$dynamicAnchor": "node",
    "type": "object",
    "properties": {
        "a": {"type": "integer"},
        "items": {"type": "array", "items": {"$dynamicRef": "#node"}},
    },
}

SCHEMAS: list[dict[str, Any]] = [
    {
        "$schema": D4,
        "id": "http://x.y/z",
        "type": "integer",
        "minimum": 2,
        "exclusiveMinimum": True,
    },
    {"$schema": D4, "type": "number", "maximum": 3, "exclusiveMaximum": False},
    {
        "$schema": D4,
        "id": "http://x.y/z",
        "definitions": {"n": {"id": "#n", "type": "string"}},
        "type": "object",
        "properties": {"a": {"$ref": "#n"}, "b": {"$ref": "#/definitions/n"}},
    },
    {
        "$schema": D6,
        "type": "array",
        "items": [{"type": "integer"}, {"type": "string"}],
        "additionalItems": False,
    },
    {
        "$schema": D6,
        "type": "array",
        "items": [{"type": "integer"}],
        "additionalItems": {"type": "null"},
    },
    {
        "$schema": D7,
        "title": "T",
        "$comment": "c",
        "type": "object",
        "required": ["a"],
        "properties": {
            "a": {"type": "string", "format": "x-mine", "default": "q", "examples": ["b"]}
        },
    },
    {
        "$schema": D7,
        "definitions": {"s": {"type": "string"}},
        "type": "object",
        "properties": {"a": {"$ref": "#/definitions/s", "minLength": 2, "type": "integer"}},
    },
    {
        "$schema": D7,
        "definitions": {"s": {"$id": "#here", "type": "string"}},
        "type": "array",
        "items": {"$ref": "#here"},
    },
    {
        "$schema": D7,
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "additionalProperties": False,
        "dependencies": {"a": ["b"]},
    },
    {
        "$schema": D7,
        "type": "object",
        "properties": {"a": {}, "b": {"type": "integer"}},
        "additionalProperties": False,
        "dependencies": {"a": {"required": ["b"]}},
    },
    {"$schema": D2019, "$defs": {"s": {"type": "string"}}, "$ref": "#/$defs/s", "minLength": 2},
    {
        "$schema": D2019,
        "$recursiveAnchor": True,
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "items": {"type": "array", "items": {"$recursiveRef": "#"}},
            "a": {"type": "integer"},
        },
    },
    {
        "$schema": D2019,
        "type": "object",
        "properties": {"a": {}, "b": {"type": "string"}},
        "additionalProperties": False,
        "dependentRequired": {"a": ["b"]},
    },
    {
        "$schema": D2020,
        "type": "array",
        "prefixItems": [{"type": "integer"}],
        "items": False,
        "minItems": 1,
    },
    {
        "$schema": D2020,
        "type": "object",
        "allOf": [
            {"properties": {"a": {"type": "integer"}}},
            {"required": ["a"], "properties": {"a": {"minimum": 1}}},
        ],
        "unevaluatedProperties": False,
    },
    {
        "$schema": D2020,
        "$id": "https://example.com/strict",
        "$dynamicAnchor": "node",
        "$ref": "tree",
        "unevaluatedProperties": False,
        "$defs": {"tree": TREE},
    },
    {"$schema": D2020, "$id": "https://example.com/loose", "$ref": "tree", "$defs": {"tree": TREE}},
    {
        "$defs": {"a/b~c %": {"type": "integer"}},
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/a~1b~0c%20%25"}},
    },
    {"type": "object", "properties": {"a": {"type": "string"}, "b": {"$ref": "#/properties/a"}}},
    {
        "type": "object",
        "properties": {"a": {"$ref": "#/x-lib/0/deep"}},
        "x-lib": [{"deep": {"type": "string"}}],
    },
    {
        "type": "object",
        "properties": {"a": {"$ref": "#an"}},
        "$defs": {"q": {"$anchor": "an", "type": "integer"}},
    },
    {
        "type": "object",
        "properties": {"a": {"$ref": "sub#/$defs/n"}},
        "$defs": {"x": {"$id": "sub", "$defs": {"n": {"type": "integer"}}}},
    },
    {
        "type": "object",
        "properties": {
            "items": {"type": "array", "items": {"$ref": "#"}},
            "a": {"type": "integer"},
        },
        "required": ["a"],
        "additionalProperties": False,
    },
    {"type": ["string", "null", "integer"], "minLength": 2, "minimum": 1},
    {"enum": ["a", "abc", 1, None], "type": ["string", "null"], "minLength": 2},
    {"const": 1, "type": "integer"},
    {"allOf": [{"type": "string"}, {"minLength": 2}, {"maxLength": 2}]},
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
    },
    {"type": "integer", "oneOf": [{"minimum": 2}, {"maximum": 0}]},
    {"type": "object", "required": ["b"], "properties": {"a": {"type": "integer"}}},
    {"type": "object", "required": ["b"], "additionalProperties": {"type": "integer"}},
    {
        "type": "object",
        "patternProperties": {"^a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    },
    {
        "type": "object",
        "patternProperties": {"a": {"minimum": 1}},
        "properties": {"a": {"type": "integer"}},
        "additionalProperties": False,
    },
    {"type": "string", "pattern": "b"},
    {"type": "string", "pattern": "^a|b$"},
    {"type": "string", "pattern": "^[a-b]+$", "minLength": 2, "maxLength": 3},
    {"type": "integer", "minimum": 0.5, "exclusiveMaximum": 2.5},
    {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "maxItems": 2},
    {
        "allOf": [{"$ref": "#/$defs/l"}, {"required": ["a"]}],
        "$defs": {
            "l": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "a": {"type": "integer"},
                    "b": {"allOf": [{"$ref": "#/$defs/l"}, {"required": ["a"]}]},
                },
            }
        },
    },
    {"type": "array", "uniqueItems": False, "minItems": 1, "items": True},
    {"type": "integer", "multipleOf": 1},
    {"type": "object", "properties": {"$ref": {"type": "string"}, "enum": {"type": "integer"}}},
]
NAMES = st.sampled_from(["a", "b", "items", "ab", "$ref", "enum"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 4) | st.sampled_from([0.5, 1.0, 2.5])
    | st.text("ab", max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def valid(schema: Any, value: Any) -> bool:
    return bool(validator_for(schema, Draft202012Validator)(schema).is_valid(value))


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_rewritten_schema_takes_the_same_values(schema: Any, data: st.DataObject) -> None:
    rewritten = grammar_schema(schema)
    for value in data.draw(st.lists(VALUES, min_size=8, max_size=8)):
        assert valid(schema, value) == valid(rewritten, value), (value, rewritten)

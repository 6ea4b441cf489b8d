"""A schema of any dialect means, rewritten, what it meant: judged by the jsonschema library."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for

from stateful_sglang.grammar.calls import check_tools, tool_call_schema
from stateful_sglang.grammar.errors import ConstraintError
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


@pytest.mark.parametrize(
    "schema",
    [
        {"minLength": 2},
        {"minimum": 1},
        {"required": ["a"]},
        {"properties": {"a": {"minimum": 1}}},
        {"items": {"type": "integer"}},
        {"anyOf": [{"required": ["a"]}, {"minLength": 1}]},
        {"type": "object", "properties": {"a": {"type": "integer"}, "b": {}},
         "dependencies": {"a": ["b"]}},
        {"type": "object", "properties": {"a": False}},
        {"type": "object", "patternProperties": {"a": {"type": "number", "minimum": 1}},
         "properties": {"a": {"type": "integer"}}},
        {"type": "string", "nullable": False, "pattern": "^a*", "minLength": 0},
    ],
)  # fmt: skip
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_schema_made_narrower_takes_no_value_that_it_refused(
    schema: Any, data: st.DataObject
) -> None:
    rewritten = grammar_schema({"$schema": D7, **schema})
    for value in data.draw(st.lists(VALUES, min_size=8, max_size=8)):
        assert valid({"$schema": D7, **schema}, value) or not valid(rewritten, value)


def test_null_joins_a_nullable_type_and_no_enumeration() -> None:
    assert valid(grammar_schema({"type": "string", "nullable": True}), None)
    assert not valid(grammar_schema({"type": "string", "nullable": True, "enum": ["a"]}), None)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$ref": "http://x.y/z"}, "remote references are not fetched"),
        ({"items": {"$ref": "other.json"}}, "'other.json' is outside the schema"),
        ({"$ref": "#/$defs/gone"}, "nowhere in the schema"),
        ({"$ref": "#gone"}, "nowhere in the schema"),
        ({"$ref": "#"}, "never ends"),
        ({"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"$ref": "#/$defs/x"}}},
         "never ends"),
        ({"anyOf": [{"type": "string"}, {"allOf": [{"$ref": "#"}]}]}, "never ends"),
        ({"$schema": D7, "type": "nothing"}, "not a JSON schema"),
        ({"$schema": D7, "minimum": "1"}, "not a JSON schema"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"properties": {"a": {"not": {"type": "string"}}}}, "#/properties/a"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "no value"),
        ({"type": "object", "additionalProperties": False, "required": ["a"]}, "no value"),
        ({"enum": ["a"], "minLength": 2}, "no value"),
        ({"type": "string", "pattern": "^ab$", "minLength": 2}, "write the length"),
        ({"type": "string", "pattern": "a{99999}"}, "more than 10000 times"),
        ({"type": "array", "minItems": 99999}, "minItems is above"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_told(schema: Any, message: str) -> None:
    with pytest.raises(ConstraintError, match=message.replace("$", r"\$")):
        grammar_schema(schema)


def test_size_and_depth_are_bounded() -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(100):
        deep = {"type": "array", "items": deep}
    with pytest.raises(ConstraintError, match="deeper than 64"):
        grammar_schema(deep)
    with pytest.raises(ConstraintError, match="more than 100000 values"):
        grammar_schema({"enum": list(range(100_001))})
    either = [{"anyOf": [{"required": [f"a{i}"]}, {"required": [f"b{i}"]}]} for i in range(24)]
    with pytest.raises(ConstraintError, match="combinations"):
        grammar_schema({"type": "object", "allOf": either})


def test_definitions_of_the_same_name_stay_each_tools_own() -> None:
    def parameters(kind: str) -> dict[str, Any]:
        properties = {"a": {"$ref": "#/$defs/v"}}
        return {
            "$id": "tool",
            "type": "object",
            "required": ["a"],
            "properties": properties,
            "$defs": {"v": {"type": kind}},
        }

    tools = [named("one", parameters("string")), named("two", parameters("null"))]
    schema = tool_call_schema(tools)
    assert valid(schema, {"name": "one", "arguments": {"a": "x"}})
    assert valid(schema, {"name": "two", "arguments": {"a": None}})
    assert not valid(schema, {"name": "one", "arguments": {"a": None}})
    assert not valid(schema, {"name": "two", "arguments": {"a": "x"}})


@pytest.mark.parametrize("parameters", [None, {}])
def test_no_parameters_means_no_arguments(parameters: Any) -> None:
    schema = tool_call_schema([named("act", parameters)])
    assert valid(schema, {"name": "act", "arguments": {}})
    assert not valid(schema, {"name": "act", "arguments": {"a": 1}})
    assert not valid(schema, {"name": "act"})


def test_arguments_are_an_object_whatever_the_schema_leaves_open() -> None:
    schema = tool_call_schema([named("act", {"title": "anything"})])
    assert valid(schema, {"name": "act", "arguments": {"a": 1}})
    assert not valid(schema, {"name": "act", "arguments": 1})


def test_only_a_required_call_minds_what_no_grammar_follows() -> None:
    tools = [named("fine", None), named("act", {"type": "array", "uniqueItems": True})]
    check_tools(tools)
    with pytest.raises(ConstraintError) as error:
        tool_call_schema(tools)
    assert error.value.tool == 1


def named(name: str, parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}

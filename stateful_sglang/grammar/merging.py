"""Keywords of two schemas that must both hold, as one set of keywords."""

from __future__ import annotations

import re
from typing import Any

from stateful_sglang.grammar.errors import ConstraintError
from stateful_sglang.grammar.references import same, types_of


def both(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Keywords of two schemas that say what both say."""
    out = {**one, **other}
    for key in one.keys() & other.keys():
        a, b = one[key], other[key]
        if key == "type":
            out[key] = _common_types(types_of(one), types_of(other))
        elif key == "enum":
            out[key] = [each for each in a if any(same(each, value) for value in b)]
        elif key == "required":
            out[key] = list(dict.fromkeys([*a, *b]))
        elif key in ("minimum", "exclusiveMinimum") or key.startswith("min"):
            out[key] = max(a, b)
        elif key in ("maximum", "exclusiveMaximum") or key.startswith("max"):
            out[key] = min(a, b)
        elif key == "format" and a != b:
            del out[key]
        elif key == "pattern" and a != b:
            raise ConstraintError(f"two patterns for one string, {a!r} and {b!r}")
        elif key in ("propertyNames", "unevaluatedProperties", "unevaluatedItems"):
            out[key] = _all_of(a, b)
    if {"properties", "patternProperties", "additionalProperties"} & out.keys():
        _merge_objects(one, other, out)
    if {"items", "prefixItems"} & out.keys():
        _merge_arrays(one, other, out)
    return out


def _all_of(*parts: Any) -> Any:
    real = [part for part in parts if part is not True]
    return real[0] if len(real) == 1 else {"allOf": real} if real else True


def _common_types(one: list[str], other: list[str]) -> list[str]:
    out = [kind for kind in one if kind in other or (kind == "integer" and "number" in other)]
    return out + [
        kind for kind in other if kind == "integer" and "number" in one and kind not in out
    ]


def _merge_objects(one: dict[str, Any], other: dict[str, Any], out: dict[str, Any]) -> None:
    names = dict.fromkeys([*one.get("properties", ()), *other.get("properties", ())])
    if names:
        out["properties"] = {
            name: _all_of(_of_property(one, name), _of_property(other, name)) for name in names
        }
    for this, that in ((one, other), (other, one)):
        for pattern in this.get("patternProperties", ()):
            if that.get("additionalProperties", True) is not True:
                raise ConstraintError(
                    f"the pattern property {pattern!r} meets additionalProperties of another schema"
                )
    patterns: dict[str, Any] = dict(one.get("patternProperties", {}))
    for pattern, schema in other.get("patternProperties", {}).items():
        patterns[pattern] = _all_of(patterns.get(pattern, True), schema)
    if patterns:
        out["patternProperties"] = patterns
    if "additionalProperties" in out:
        out["additionalProperties"] = _all_of(
            one.get("additionalProperties", True), other.get("additionalProperties", True)
        )


def _of_property(schema: dict[str, Any], name: str) -> Any:
    """What a schema says of a property of this name."""
    said = [schema["properties"][name]] if name in schema.get("properties", ()) else []
    said += [
        each
        for pattern, each in schema.get("patternProperties", {}).items()
        if _matches(pattern, name)
    ]
    return _all_of(*said) if said else schema.get("additionalProperties", True)


def separate_patterns(out: dict[str, Any]) -> None:
    """Give up patterns that match a declared name: the compiler would let either's value stand."""
    patterns = out.get("patternProperties", {})
    names = out.get("properties", ())
    kept = {p: each for p, each in patterns.items() if not any(_matches(p, n) for n in names)}
    if len(kept) < len(patterns):
        out["patternProperties"] = kept
        out["additionalProperties"] = False


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise ConstraintError(f"the pattern {pattern!r} can't be read: {error}") from None


def _merge_arrays(one: dict[str, Any], other: dict[str, Any], out: dict[str, Any]) -> None:
    a, b = one.get("prefixItems", []), other.get("prefixItems", [])
    rest_a, rest_b = one.get("items", True), other.get("items", True)
    prefix = [
        _all_of(a[i] if i < len(a) else rest_a, b[i] if i < len(b) else rest_b)
        for i in range(max(len(a), len(b)))
    ]
    if prefix:
        out["prefixItems"] = prefix
    if "items" in out:
        out["items"] = _all_of(rest_a, rest_b)


def with_required(schema: dict[str, Any]) -> dict[str, Any]:
    """Required names are declared: the compiler demands declared ones only.

    And declared ones say what patterns that match their names say, which it doesn't look at.
    """
    properties, required = schema.get("properties", {}), schema.get("required", ())
    if "patternProperties" not in schema and all(name in properties for name in required):
        return dict(schema)
    names = dict.fromkeys([*properties, *required])
    return {**schema, "properties": {name: _of_property(schema, name) for name in names}}

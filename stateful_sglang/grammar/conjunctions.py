"""Schemas that must hold together, as one: the compiler reads one keyword of several and drops the
rest.

Input and output are of the one form that :mod:`~stateful_sglang.grammar.references` makes; the
output has no ``allOf``, nothing beside a ``$ref``, and nothing beside ``anyOf`` or ``oneOf``.
"""

from __future__ import annotations

import json
import math
from typing import Any

from jsonschema import Draft202012Validator

from stateful_sglang.grammar.bounds import MAX_COMBINATIONS, MAX_NODES
from stateful_sglang.grammar.errors import ConstraintError
from stateful_sglang.grammar.merging import both, separate_patterns, with_required
from stateful_sglang.grammar.patterns import with_length
from stateful_sglang.grammar.references import target, types_of

_STRING = frozenset({"minLength", "maxLength", "pattern", "format"})
_NUMBER = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
_ARRAY = frozenset({"items", "prefixItems", "minItems", "maxItems", "unevaluatedItems"})
_OBJECT = frozenset(
    {"properties", "patternProperties", "additionalProperties", "propertyNames", "required"}
    | {"minProperties", "maxProperties", "unevaluatedProperties"}
)
_OF_TYPE = {"string": _STRING, "number": _NUMBER, "array": _ARRAY, "object": _OBJECT}
_CHOICES = ("anyOf", "oneOf")
_INT64 = (-(2**63), 2**63 - 1)


class Conjunctions:
    """Rewrites ``schemas`` (by name), and whatever refers to them."""

    def __init__(self, schemas: dict[str, Any]) -> None:
        self._schemas = schemas
        self._done: dict[str, Any] = {}
        self._merged: dict[str, str] = {}
        self._budget = MAX_NODES

    def document(self, root: Any) -> Any:
        """`root` with the definitions it needs under ``$defs``.

        Raises:
            ConstraintError: Nothing can satisfy it, or it can't be said in one schema.
        """
        try:
            root = self._resolved(self._simple(root))
        except RecursionError:
            raise ConstraintError("the schema's combinations are nested too deep") from None
        if root is False:
            raise ConstraintError("no value can satisfy the schema")
        if root is True:
            return {}
        needed: dict[str, Any] = {}
        stack = [root]
        while stack:
            for name in _references(stack.pop()):
                if name not in needed:
                    made = self._definition(name)
                    needed[name] = {} if made is True else made
                    stack.append(made)
        return {**root, "$defs": needed} if needed else root

    def _definition(self, name: str) -> Any:
        if name not in self._done:
            self._done[name] = {"$ref": f"#/$defs/{name}"}  # While it is being made.
            self._done[name] = self._simple(self._schemas[name])
        return self._done[name]

    def _resolved(self, schema: Any) -> Any:
        """The schema itself where it is only the name of another."""
        seen = set()
        while isinstance(schema, dict) and set(schema) == {"$ref"}:
            if (name := target(schema["$ref"])) in seen:
                return schema
            seen.add(name)
            schema = self._definition(name)
        return schema

    def _simple(self, schema: Any) -> Any:
        self._budget -= 1
        if self._budget < 0:
            raise ConstraintError(f"the schema's combinations pass {MAX_NODES} values")
        if isinstance(schema, bool) or set(schema) == {"$ref"}:
            return schema
        choices = [key for key in _CHOICES if key in schema]
        if "allOf" in schema or "$ref" in schema or (choices and len(schema) > 1):
            return self._conjunction(schema)
        if choices:
            return self._choice(choices[0], schema[choices[0]])
        return self._plain(schema)

    def _conjunction(self, schema: dict[str, Any]) -> Any:
        """One schema for several; under a name, because it may come back inside itself."""
        key = json.dumps(schema, sort_keys=True)
        name = self._merged.get(key)
        if name is None:
            if len(self._merged) >= MAX_COMBINATIONS:
                raise ConstraintError(f"the schema has more than {MAX_COMBINATIONS} combinations")
            name = self._merged[key] = f"m{len(self._merged)}"
            self._done[name] = {"$ref": f"#/$defs/{name}"}
            self._done[name] = self._simple(self._combined(schema))
            made = self._done[name]
            if isinstance(made, bool) or name not in _references(made):
                return made
        made = self._done[name]
        return made if isinstance(made, bool) else {"$ref": f"#/$defs/{name}"}

    def _combined(self, schema: dict[str, Any]) -> Any:
        base: dict[str, Any] = {}
        choices: list[tuple[str, list[Any]]] = []
        stack: list[tuple[Any, frozenset[str]]] = [(schema, frozenset())]
        while stack:
            part, way = stack.pop()
            if part is True:
                continue
            if part is False:
                return False
            if "$ref" in part:
                name = target(part["$ref"])
                if name in way:
                    raise ConstraintError("a $ref leads back to itself and never ends")
                following = [(self._schemas[name], way | {name})]
            else:
                following = []
            # As written: the compiler wants properties in the order in which they are declared.
            following += [(each, way) for each in part.get("allOf", ())]
            stack += reversed(following)
            choices += [(key, part[key]) for key in _CHOICES if key in part]
            rest = {k: v for k, v in part.items() if k not in ("$ref", "allOf", *_CHOICES)}
            self._budget -= len(rest)
            base = both(base, rest) if base and rest else base or rest
        if not choices:
            return base
        (key, alternatives), *others = choices
        common = {"allOf": [base, *({kind: options} for kind, options in others)]}
        if not base and not others:
            return {key: alternatives}
        return {key: [{"allOf": [common, each]} for each in alternatives]}

    def _choice(self, key: str, alternatives: list[Any]) -> Any:
        made = [self._simple(each) for each in alternatives]
        made = [each for each in made if self._resolved(each) is not False]
        if not made:
            return False
        if key == "anyOf" and True in made:
            return True
        return made[0] if len(made) == 1 else {key: made}

    def _plain(self, schema: dict[str, Any]) -> Any:
        """Keywords only. The compiler's own readings are met here."""
        out = with_required(schema)
        kinds = types_of(out)
        if "enum" in out:
            return self._enum(out)
        if "type" in out and not kinds:
            return False
        if not kinds:
            # Of a schema without type the compiler reads what it likes; it means these.
            kinds = [kind for kind, keys in _OF_TYPE.items() if keys & out.keys()]
        kept = [kind for kind in kinds if self._make(kind, out)]
        if kinds and not kept:
            return False
        for kind, keys in _OF_TYPE.items():
            if kept and kind not in kept and not (kind == "number" and "integer" in kept):
                out = {key: value for key, value in out.items() if key not in keys}
        if kept:
            out["type"] = kept[0] if len(kept) == 1 else kept
        return out

    def _enum(self, out: dict[str, Any]) -> Any:
        rest = {key: value for key, value in out.items() if key != "enum"}
        rest.pop("format", None)
        values = out["enum"]
        if rest:
            validator = Draft202012Validator({**rest, "$defs": self._schemas})
            values = [each for each in values if validator.is_valid(each)]
        return {"enum": values} if values else False

    def _make(self, kind: str, out: dict[str, Any]) -> bool:
        """Bring the keywords of one type into form; False where no value of the type is left."""
        if kind == "string":
            return _string(out)
        if kind in ("number", "integer"):
            return _number(out, kind == "integer" and "number" not in types_of(out))
        if kind == "array":
            return self._array(out)
        if kind == "object":
            return self._object(out)
        return True

    def _array(self, out: dict[str, Any]) -> bool:
        if "unevaluatedItems" in out:
            out.setdefault("items", out.pop("unevaluatedItems"))
            out.pop("unevaluatedItems", None)
        prefix = [self._simple(each) for each in out.get("prefixItems", ())]
        shortest, longest = out.get("minItems", 0), out.get("maxItems", math.inf)
        for index, each in enumerate(prefix):
            if self._resolved(each) is False:
                prefix, longest = prefix[:index], min(longest, index)
                out["items"] = False
                break
        rest = self._simple(out["items"]) if "items" in out else True
        if self._resolved(rest) is False:
            longest = min(longest, len(prefix))
            rest = False
        if shortest > longest:
            return False
        if longest <= len(prefix):
            prefix, rest = prefix[: int(longest)], False
        if prefix:
            out["prefixItems"] = prefix
        else:
            out.pop("prefixItems", None)
        if "items" in out or prefix or shortest or longest < math.inf:
            out["items"] = rest
        if longest < math.inf:
            out["maxItems"] = int(longest)
        return True

    def _object(self, out: dict[str, Any]) -> bool:
        if "unevaluatedProperties" in out:
            out.setdefault("additionalProperties", out["unevaluatedProperties"])
            del out["unevaluatedProperties"]
        required = out.get("required", [])
        separate_patterns(out)
        for key in ("properties", "patternProperties"):
            if key not in out:
                continue
            made = {name: self._simple(each) for name, each in out[key].items()}
            gone = {name for name, each in made.items() if self._resolved(each) is False}
            if key == "properties" and gone & set(required):
                return False
            if gone:
                # A name that must not occur: only a closed object says so.
                out["additionalProperties"] = False
            out[key] = {name: each for name, each in made.items() if name not in gone}
        for key in ("additionalProperties", "propertyNames"):
            if key in out:
                out[key] = self._simple(out[key])
        if out.get("patternProperties") == {}:
            del out["patternProperties"]
        if self._resolved(out.get("additionalProperties")) is False:
            out["additionalProperties"] = False
        least = max(out.get("minProperties", 0), len(required))
        if least > out.get("maxProperties", math.inf):
            return False
        closed = out.get("additionalProperties") is False and "patternProperties" not in out
        return not (closed and least > len(out.get("properties", ())))


def _string(out: dict[str, Any]) -> bool:
    shortest, longest = out.get("minLength", 0), out.get("maxLength")
    if longest is not None and shortest > longest:
        return False
    if "pattern" in out and {"minLength", "maxLength"} & out.keys():
        pattern = with_length(out["pattern"], int(shortest), longest)
        if pattern is None:
            raise ConstraintError(
                f"pattern {out['pattern']!r} together with minLength or maxLength: "
                "write the length into the pattern, as in ^[a-z]{1,20}$"
            )
        out["pattern"] = pattern
        out.pop("minLength", None)
        out.pop("maxLength", None)
    if {"pattern", "minLength", "maxLength"} & out.keys():
        out.pop("format", None)
    return True


def _number(out: dict[str, Any], whole: bool) -> bool:
    if whole:
        low, high = _INT64
        bounds = _NUMBER & out.keys()
        if "minimum" in out:
            low = max(low, math.ceil(out.pop("minimum")))
        if "exclusiveMinimum" in out:
            low = max(low, math.floor(out.pop("exclusiveMinimum")) + 1)
        if "maximum" in out:
            high = min(high, math.floor(out.pop("maximum")))
        if "exclusiveMaximum" in out:
            high = min(high, math.ceil(out.pop("exclusiveMaximum")) - 1)
        if {"minimum", "exclusiveMinimum"} & bounds:
            out["minimum"] = low
        if {"maximum", "exclusiveMaximum"} & bounds:
            out["maximum"] = high
        return low <= high
    low_at, high_at = out.get("minimum", -math.inf), out.get("maximum", math.inf)
    above, below = out.get("exclusiveMinimum", -math.inf), out.get("exclusiveMaximum", math.inf)
    return bool(max(low_at, above) <= min(high_at, below) and above < high_at and low_at < below)


def _references(schema: Any) -> list[str]:
    """Names a finished schema refers to, at any depth."""
    found, stack = [], [schema]
    while stack:
        part = stack.pop()
        if not isinstance(part, dict):
            continue
        if "$ref" in part:
            found.append(target(part["$ref"]))
        for key in ("properties", "patternProperties"):
            stack += part.get(key, {}).values()
        for key in ("anyOf", "oneOf", "prefixItems"):
            stack += part.get(key, ())
        stack += [part.get(key) for key in ("items", "additionalProperties", "propertyNames")]
    return found

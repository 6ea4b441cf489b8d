"""From any dialect to one form: 2020-12 with every reference into one ``$defs`` of fresh names.

What a reference means depends on where it stands (the nearest ``$id``, and for dynamic references
the way there), so each target gets a name of its own for each such meaning. Schemas of several
tools share one :class:`Definitions` and can't meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urljoin

from referencing import Registry
from referencing.exceptions import NoSuchAnchor, PointerToNowhere, Unresolvable
from referencing.jsonschema import lookup_recursive_ref

from stateful_sglang.grammar import bounds
from stateful_sglang.grammar.dialects import Dialect, dialect_of
from stateful_sglang.grammar.errors import ConstraintError
from stateful_sglang.grammar.patterns import anchored

_BASE = "https://schema.invalid/"
"""Where a schema without `$id` stands; never fetched, as nothing is."""
_KEPT = frozenset(
    {"type", "enum", "required"} | {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
)
_AT_MOST = frozenset({"maxLength", "maxItems", "maxProperties"})
_AT_LEAST = frozenset({"minLength", "minItems", "minProperties"})
_ONE = ("additionalProperties", "propertyNames", "unevaluatedProperties", "unevaluatedItems")
_MANY = ("anyOf", "oneOf", "allOf", "prefixItems")
FORMATS = frozenset(
    {"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "json-pointer"}
    | {"relative-json-pointer", "time", "uri", "uri-reference", "uri-template", "uuid"}
)
"""Those that the compiler knows. Any other is an annotation, as JSON Schema has it."""


class Definitions:
    """Targets of references, rewritten. `unsupported` lists what no grammar can follow."""

    def __init__(self) -> None:
        self.schemas: dict[str, Any] = {}
        self.unsupported: list[ConstraintError] = []
        self._names: dict[tuple[Any, ...], str] = {}
        self._kept: list[Any] = []

    def add(self, schema: Any) -> Any:
        """Rewrite a whole schema; returns what stands for it, with its targets in `schemas`.

        Raises:
            ConstraintError: It is no schema, passes a bound, refers to a place outside itself, or
                refers to itself without end.
        """
        bounds.check_schema_size(schema)
        dialect = dialect_of(schema)
        self._kept.append(schema)  # Names go by identity, which must not be used again.
        rewriter = _Rewriter(self, dialect, schema)
        try:
            root = rewriter.rewrite_all()
        except RecursionError:
            raise ConstraintError("the schema is nested too deep") from None
        return root

    def name(self, key: tuple[Any, ...]) -> tuple[str, bool]:
        """The name of a target, and whether it is new."""
        known = self._names.get(key)
        if known is not None:
            return known, False
        name = self._names[key] = f"s{len(self._names)}"
        return name, True

    def refuse_cycles(self, names: Iterable[str], places: Mapping[str, str]) -> None:
        """A reference that comes back to itself before anything is read has no meaning."""
        done: set[str] = set()
        for start in names:
            path = {start: iter(in_place(self.schemas[start]))}
            while path:
                name = next(reversed(path))
                following = next((each for each in path[name] if each not in done), None)
                if following is None:
                    done.add(name)
                    del path[name]
                elif following in path:
                    raise ConstraintError(
                        "a $ref leads back to itself and never ends: nothing (no property, no "
                        "item) is consumed on the way",
                        places.get(following, ""),
                    )
                else:
                    path[following] = iter(in_place(self.schemas[following]))


def in_place(schema: Any) -> list[str]:
    """Names that a schema refers to for the very same value."""
    if not isinstance(schema, dict):
        return []
    found = [target(schema["$ref"])] if "$ref" in schema else []
    for key in ("allOf", "anyOf", "oneOf"):
        for each in schema.get(key, ()):
            found += in_place(each)
    return found


def target(reference: str) -> str:
    """The name in ``#/$defs/name``."""
    return reference.removeprefix("#/$defs/")


class _Rewriter:
    def __init__(self, definitions: Definitions, dialect: Dialect, schema: Any) -> None:
        self._definitions = definitions
        self._dialect = dialect
        resource = dialect.resource(schema)
        uri = urljoin(_BASE, resource.id() or "")
        registry = Registry().with_resource(uri, resource)
        self._schema = schema
        self._resolver = registry.resolver(base_uri=uri)
        self._work: list[tuple[str, Any, Any, str]] = []

    def rewrite_all(self) -> Any:
        root = self._named(self._schema, self._resolver, "#")
        places: dict[str, str] = {}
        while self._work:
            name, schema, resolver, at = self._work.pop()
            self._definitions.schemas[name] = self._rewrite(schema, resolver, at)
            places[name] = at
        self._definitions.refuse_cycles(places, places)
        return root

    def _named(self, schema: Any, resolver: Any, at: str) -> Any:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise ConstraintError("a reference leads to something that is no schema", at)
        name, new = self._definitions.name((id(schema), *_scope(resolver)))
        if new:
            self._work.append((name, schema, resolver, at))
        return {"$ref": f"#/$defs/{name}"}

    def _child(self, schema: Any, resolver: Any, at: str) -> Any:
        if isinstance(schema, dict):
            resolver = resolver.in_subresource(self._dialect.resource(schema))
        return self._rewrite(schema, resolver, at)

    def _rewrite(self, schema: Any, resolver: Any, at: str) -> Any:
        """The schema in the one form; `resolver` already stands inside it."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise ConstraintError("not a JSON schema: expected an object or a boolean", at)
        references = self._references(schema, resolver, at)
        if references and self._dialect.lone_ref:
            return references[0]
        out = self._keywords(schema, resolver, at)
        if references:
            if not out and len(references) == 1:
                return references[0]
            out["allOf"] = [*references, *out.get("allOf", ())]
        return out

    def _references(self, schema: dict[str, Any], resolver: Any, at: str) -> list[Any]:
        found = []
        for key in ("$ref", "$dynamicRef", "$recursiveRef"):
            reference = schema.get(key)
            if not isinstance(reference, str):
                continue
            where = f"{at}/{key}"
            try:
                if key == "$recursiveRef":
                    resolved = lookup_recursive_ref(resolver)
                else:
                    resolved = resolver.lookup(reference)
            except (NoSuchAnchor, PointerToNowhere):
                raise ConstraintError(f"{reference!r} is nowhere in the schema", where) from None
            except (Unresolvable, ValueError):
                raise ConstraintError(
                    f"{reference!r} is outside the schema; remote references are not fetched: "
                    "put the definition into $defs",
                    where,
                ) from None
            found.append(self._named(resolved.contents, resolved.resolver, reference))
        return found

    def _keywords(self, schema: dict[str, Any], resolver: Any, at: str) -> dict[str, Any]:
        out: dict[str, Any] = {key: schema[key] for key in schema if key in _KEPT}
        if "const" in schema and self._dialect.name != "draft-04":
            out["enum"] = (
                [schema["const"]]
                if "enum" not in out
                else [each for each in out["enum"] if same(each, schema["const"])]
            )
        self._limit(schema, out, at)
        for key in _ONE:
            if key in schema:
                out[key] = self._child(schema[key], resolver, f"{at}/{key}")
        for key in _MANY:
            if key in schema and not (key == "prefixItems" and self._dialect.lone_ref):
                out[key] = [
                    self._child(each, resolver, f"{at}/{key}/{index}")
                    for index, each in enumerate(schema[key])
                ]
        for key in ("properties", "patternProperties"):
            if key in schema:
                out[key] = {
                    anchored(name) if key == "patternProperties" else name: self._child(
                        each, resolver, f"{at}/{key}/{name.replace('~', '~0').replace('/', '~1')}"
                    )
                    for name, each in schema[key].items()
                }
        self._items(schema, out, resolver, at)
        self._bounds_of_draft_04(schema, out)
        self._dependencies(schema, out, resolver, at)
        self._nullable(schema, out)
        self._note_unsupported(schema, out, at)
        return out

    def _limit(self, schema: dict[str, Any], out: dict[str, Any], at: str) -> None:
        for key in _AT_MOST & schema.keys():
            # More would not fit into an answer; and the compiler's state grows with the number.
            out[key] = min(int(schema[key]), bounds.MAX_REPEAT)
        for key in (each for each in _AT_LEAST & schema.keys() if schema[each] > 0):
            out[key] = int(schema[key])
            if out[key] > bounds.MAX_REPEAT:
                self._unsupported(f"{key} is above {bounds.MAX_REPEAT}", at)
        if "pattern" in schema:
            try:
                bounds.check_text(schema["pattern"], "pattern")
            except ConstraintError as error:
                self._unsupported(str(error), at)
            out["pattern"] = anchored(schema["pattern"])
        if schema.get("format") in FORMATS and not {"pattern", "minLength", "maxLength"} & set(out):
            out["format"] = schema["format"]

    def _items(self, schema: dict[str, Any], out: dict[str, Any], resolver: Any, at: str) -> None:
        items = schema.get("items")
        if isinstance(items, list):
            out["prefixItems"] = [
                self._child(each, resolver, f"{at}/items/{index}")
                for index, each in enumerate(items)
            ]
            out["items"] = self._child(
                schema.get("additionalItems", True), resolver, f"{at}/additionalItems"
            )
        elif items is not None:
            out["items"] = self._child(items, resolver, f"{at}/items")

    @staticmethod
    def _bounds_of_draft_04(schema: dict[str, Any], out: dict[str, Any]) -> None:
        for key, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
            if isinstance(schema.get(exclusive), bool):
                del out[exclusive]
                if schema[exclusive] and key in out:
                    out[exclusive] = out.pop(key)

    def _dependencies(
        self, schema: dict[str, Any], out: dict[str, Any], resolver: Any, at: str
    ) -> None:
        """Either the property is absent, or what depends on it holds."""
        for key in ("dependencies", "dependentRequired", "dependentSchemas"):
            for name, needs in schema.get(key, {}).items():
                if isinstance(needs, list):
                    then: Any = {"required": [name, *needs]}
                else:
                    child = self._child(needs, resolver, f"{at}/{key}/{name}")
                    then = {"required": [name], "allOf": [child]}
                if "type" not in schema or "object" in types_of(schema):
                    absent = {"properties": {name: False}}
                    out.setdefault("allOf", []).append({"anyOf": [absent, then]})

    @staticmethod
    def _nullable(schema: dict[str, Any], out: dict[str, Any]) -> None:
        """OpenAPI 3.0: null joins the type where one is named."""
        if schema.get("nullable") is True and "type" in out:
            kinds = types_of(out)
            out["type"] = kinds if "null" in kinds else [*kinds, "null"]

    def _note_unsupported(self, schema: dict[str, Any], out: dict[str, Any], at: str) -> None:
        if schema.get("uniqueItems") is True and out.get("maxItems", 2) > 1:
            self._unsupported("uniqueItems: no grammar can compare items", at)
        multiple = schema.get("multipleOf")
        if multiple is not None and (multiple != 1 or types_of(out) != ["integer"]):
            self._unsupported("multipleOf: no grammar can divide", at)
        if "contains" in schema:
            self._unsupported("contains: no grammar can look for an item", at)
        if "if" in schema and ("then" in schema or "else" in schema):
            self._unsupported("if/then/else: write the cases with anyOf", at)
        if schema.get("not") in ({}, True):
            out["enum"] = []
        elif "not" in schema and schema["not"] is not False:
            self._unsupported("not: no grammar can exclude a schema", at)

    def _unsupported(self, message: str, at: str) -> None:
        self._definitions.unsupported.append(ConstraintError(message, at))


def types_of(schema: dict[str, Any]) -> list[str]:
    kinds = schema.get("type", [])
    return [kinds] if isinstance(kinds, str) else list(kinds)


def _scope(resolver: Any) -> tuple[str, ...]:
    """What a meaning depends on beside its place: the resources on the way, outermost first."""
    way = dict.fromkeys(reversed([uri for uri, _ in resolver.dynamic_scope()]))
    return (resolver._base_uri, *way)


def same(one: Any, other: Any) -> bool:
    """Equality of JSON: 1 is 1.0, but not true."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)

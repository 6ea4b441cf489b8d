"""Which JSON Schema a schema is written in, and whether it is one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jsonschema import (
    Draft4Validator,
    Draft6Validator,
    Draft7Validator,
    Draft201909Validator,
    Draft202012Validator,
    SchemaError,
)
from jsonschema.protocols import Validator
from referencing.jsonschema import (
    DRAFT4,
    DRAFT6,
    DRAFT7,
    DRAFT201909,
    DRAFT202012,
    SchemaResource,
)

from stateful_sglang.grammar.errors import ConstraintError


class Dialect(NamedTuple):
    """One draft: its meta-schema, its way of naming places, and whether `$ref` stands alone."""

    name: str
    validator: type[Validator]
    specification: Any
    lone_ref: bool
    """Up to draft-07, everything beside a `$ref` is ignored."""

    def resource(self, contents: Any) -> SchemaResource:
        return self.specification.create_resource(contents)  # type: ignore[no-any-return]


DRAFT_04 = Dialect("draft-04", Draft4Validator, DRAFT4, True)
DRAFT_2019 = Dialect("2019-09", Draft201909Validator, DRAFT201909, False)
DRAFT_2020 = Dialect("2020-12", Draft202012Validator, DRAFT202012, False)
_BY_NAME: Mapping[str, Dialect] = {
    "draft-04": DRAFT_04,
    "draft-06": Dialect("draft-06", Draft6Validator, DRAFT6, True),
    "draft-07": Dialect("draft-07", Draft7Validator, DRAFT7, True),
    "draft/2019-09": DRAFT_2019,
    "draft/2020-12": DRAFT_2020,
}
_NAMED = re.compile(r"^https?://json-schema\.org/(draft[-/][0-9-]+)/schema/?#?$")
_UNNAMED = (DRAFT_2020, DRAFT_2019, DRAFT_04)
"""Tried in turn where no known draft is named: the newest that the schema is valid in."""


def dialect_of(schema: Any) -> Dialect:
    """The dialect of a whole schema, which is proven to be one.

    Raises:
        ConstraintError: It is no schema of the draft it names, or of any.
    """
    named = schema.get("$schema") if isinstance(schema, dict) else None
    match = _NAMED.match(named) if isinstance(named, str) else None
    known = _BY_NAME.get(match[1]) if match else None
    first: ConstraintError | None = None
    for dialect in (known,) if known else _UNNAMED:
        try:
            dialect.validator.check_schema(_anonymous(schema))
        except SchemaError as error:
            at = "#" + "".join(f"/{part}" for part in error.absolute_path)
            message = error.message if len(error.message) < 300 else error.message[:300] + "…"
            first = first or ConstraintError(f"not a JSON schema: {message}", at)
        except RecursionError:
            raise ConstraintError("the JSON schema is nested too deep") from None
        else:
            return dialect
    assert first is not None
    raise first


def _anonymous(schema: Any) -> Any:
    """Without the name of its meta-schema, which is ours to choose and never fetched."""
    if not isinstance(schema, dict):
        return schema
    return {key: value for key, value in schema.items() if key != "$schema"}

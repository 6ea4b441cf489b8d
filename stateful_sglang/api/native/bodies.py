"""What every body of our routes shares: how it refuses, and how a JSON schema may come."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError


def refusal(message: str, param: str = "") -> PydanticCustomError:
    """An error of a validator; `param` names the field where the location alone does not."""
    return PydanticCustomError("refused", "{message}", {"message": message, "param": param})


class Body(BaseModel):
    """Refuses unknown fields and silent conversions: a typing error is answered, not guessed at."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _parsed_schema(value: Any) -> Any:
    """A schema may come as an object, or as its text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise refusal(f"not JSON: {error}") from error


JsonSchema = Annotated[dict[str, Any], BeforeValidator(_parsed_schema)]
"""Only parsed here: whether it is a schema takes long to find out, and is asked off the loop."""

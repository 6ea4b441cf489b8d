"""What can be wrong with a constraint."""

from __future__ import annotations


class ConstraintError(ValueError):
    """A constraint that can't be used.

    `at` is the JSON pointer inside the schema, or "" for the whole; `tool` the index of the tool
    whose parameters are meant, where there is one.
    """

    def __init__(self, message: str, at: str = "", tool: int | None = None) -> None:
        super().__init__(f"{message} (at {at})" if at else message)
        self.at = at
        self.tool = tool

    def again(self) -> ConstraintError:
        """The same error, to be raised once more: a raised one keeps its first traceback."""
        copy = ConstraintError(str(self), tool=self.tool)
        copy.at = self.at
        return copy

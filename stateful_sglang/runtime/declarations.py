"""What is declared of an option of ours, and all that follows from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple


class OptionError(ValueError):
    """A value that an option does not take; the message says which, and what it takes."""


class Bounds(NamedTuple):
    """Numbers that an option takes."""

    low: float
    high: float
    """Included."""
    expected: str
    """End of the error's sentence: what was expected, and what to do."""


class Option(NamedTuple):
    """What is declared of one option beside its name and its default."""

    help: str | Callable[[], str]
    """Without the default; a function where it lists what a registry holds."""
    metavar: str | None = None
    choices: Callable[[], Sequence[str]] | None = None
    """A function, so that a registry is asked when it is needed."""
    bounds: Bounds | None = None
    kind: type | None = None
    """Of its values, where the default is None; else the default's."""
    default_note: str = ""
    """What a default stands for, where its name does not tell."""
    settable: bool = True
    """Can be given on the command line; else the launcher finds out."""
    travels: bool = True
    """Processes of the server need it as well."""


def about(help: str | Callable[[], str], **more: Any) -> dict[str, Option]:
    """The metadata of a field that is an option; the rest is `Option`'s."""
    return {"option": Option(help, **more)}


class Declared(NamedTuple):
    """One option with all that follows from its field."""

    name: str
    default: Any
    kind: type
    """Of its values: bool, int, float, str, Path, or tuple, which is of strings."""
    option: Option

    @property
    def flag(self) -> str:
        """How it is written on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def help(self) -> str:
        """Its help text, without the default."""
        text = self.option.help
        return text if isinstance(text, str) else text()

    @property
    def choices(self) -> tuple[str, ...] | None:
        """The words it takes on the command line; None where it takes more than a few."""
        if self.kind is bool:
            return ("on", "off")
        return None if self.option.choices is None else tuple(self.option.choices())

    @property
    def shown_default(self) -> str:
        """The default as a person would write it; empty where there is none."""
        if self.default in (None, ()):
            return ""
        if self.kind is bool:
            return "on" if self.default else "off"
        return str(self.default)

    def problem(self, value: Any) -> str | None:
        """Why the option does not take this value; None where it does."""
        if value is None and self.default is None:
            return None
        accepted: Any = (int, float) if self.kind is float else self.kind
        if not isinstance(value, accepted) or (type(value) is bool) != (self.kind is bool):
            return f"{self.flag} is {value!r}; expected a value of type {self.kind.__name__}"
        bounds = self.option.bounds
        if bounds is not None and not bounds.low <= value <= bounds.high:
            return f"{self.flag} is {value}; {bounds.expected}"
        if self.option.choices is not None and value not in self.option.choices():
            known = ", ".join(self.option.choices())
            return f"{self.flag} is {value!r}; expected one of {known}"
        return None


def declarations(options: type[Any]) -> tuple[Declared, ...]:
    """Every option that is a field of this dataclass, in its order."""
    return tuple(
        Declared(
            each.name,
            each.default,
            each.metadata["option"].kind or type(each.default),
            each.metadata["option"],
        )
        for each in fields(options)
    )

"""Whether SGLang's grammar compiler takes a constraint: asked of the compiler, in a process apart.

It compiles for a vocabulary of single bytes, which costs milliseconds, and looks for places where
the grammar allows nothing at all: there the sampler would have no token to pick.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from stateful_sglang.grammar.errors import ConstraintError

KNOWN_FORM = "v16"
"""Version of the compiler's serialised grammars that `dead_rule` reads; others it leaves alone."""
_WHERE = re.compile(r"^\[[^\]]*\] \S+\.cc:\d+: ")
_STRING, _CLASS, _CLASS_STAR, _EMPTY, _RULE, _SEQUENCE, _CHOICES, _TAGS, _REPEAT = range(9)


def check(kind: str, text: str) -> str:
    """Compile a prepared constraint; returns nothing of use.

    Args:
        kind: ``json_schema``, ``regex`` or ``ebnf``.
        text: What SGLang's sampling parameter of that kind will be.

    Raises:
        ConstraintError: The compiler refuses it, or it leads where nothing is allowed.
    """
    import xgrammar

    read = {
        "json_schema": xgrammar.Grammar.from_json_schema,
        "regex": xgrammar.Grammar.from_regex,
        "ebnf": xgrammar.Grammar.from_ebnf,
    }[kind]
    what = {"json_schema": "schema", "regex": "regular expression", "ebnf": "grammar"}[kind]
    try:
        grammar = read(text)
        compiled = _compiler().compile_grammar(grammar)
        matcher = xgrammar.GrammarMatcher(compiled)
        mask = xgrammar.allocate_token_bitmask(1, compiled.tokenizer_info.vocab_size)
        matcher.fill_next_token_bitmask(mask)
    except RuntimeError as error:
        message = _WHERE.sub("", str(error)).strip()
        raise ConstraintError(f"the {what} can't be compiled: {message}") from None
    if not bool(mask.any()):
        raise ConstraintError(f"the {what} matches no text at all: it never gets to a first one")
    if kind != "regex" and (rule := dead_rule(json.loads(grammar.serialize_json()))):
        raise ConstraintError(
            f"the {what} leads where nothing is allowed: {rule!r} only ever contains itself, "
            "give it an alternative that ends"
        )
    return ""


def _compiler() -> Any:
    import xgrammar

    if not _COMPILER:
        vocabulary = [*(bytes([value]) for value in range(256)), "<end>"]
        info = xgrammar.TokenizerInfo(vocabulary, stop_token_ids=[256])
        _COMPILER.append(xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False))
    return _COMPILER[0]


_COMPILER: list[Any] = []


def dead_rule(serialised: dict[str, Any]) -> str | None:
    """Name of a rule that the root leads to, that derives no text and can't go on without end.

    ``x ::= x "a"`` is dead. ``x ::= "a" x`` isn't: it ends with the answer's length.
    """
    if serialised.get("__VERSION__") != KNOWN_FORM:
        return None
    rules = _Rules(serialised)
    ending = rules.ending()
    going_on = rules.going_on(ending)
    for index in rules.reachable():
        if index not in ending and index not in going_on:
            return rules.names[index]
    return None


class _Rules:
    """The rules of a serialised grammar, by index."""

    def __init__(self, serialised: dict[str, Any]) -> None:
        data, starts = serialised["grammar_expr_data"], serialised["grammar_expr_indptr"]
        self._expressions = [(data[at], data[at + 2 : at + 2 + data[at + 1]]) for at in starts]
        self.names = [rule[0] for rule in serialised["rules"]]
        self._bodies = [rule[1] for rule in serialised["rules"]]
        self._root = serialised["root_rule_id"]
        self._inner_first = self._post_order()
        """Those the root leads to, each after the ones it mentions: one pass settles most."""

    def ending(self) -> set[int]:
        """Rules that derive some text: the least set that is closed under its productions."""
        return self._closure(self._ends)

    def _consuming(self) -> set[int]:
        """Rules that may read at least one character on the way, ending or not."""
        return self._closure(self._consumes)

    def _closure(self, holds: Callable[[int, set[int]], bool]) -> set[int]:
        found: set[int] = set()
        left = self._inner_first
        while True:
            still = []
            for index in left:
                if holds(self._bodies[index], found):
                    found.add(index)
                else:
                    still.append(index)
            if len(still) == len(left):
                return found
            left = still

    def going_on(self, ending: set[int]) -> set[int]:
        """Rules that derive no text, but read characters without end."""
        consuming = self._consuming()
        steps = {
            index: self._steps(self._bodies[index], ending, consuming)
            for index in self._inner_first
            if index not in ending
        }
        loops = {
            index
            for index, ways in steps.items()
            if any(read and index in self._from(after, steps) for after, read in ways)
        }
        return {index for index in steps if loops & self._from(index, steps)}

    @staticmethod
    def _from(start: int, steps: dict[int, list[tuple[int, bool]]]) -> set[int]:
        seen, stack = set(), [start]
        while stack:
            index = stack.pop()
            if index not in seen:
                seen.add(index)
                stack += [after for after, _ in steps.get(index, ())]
        return seen

    def _ends(self, expression: int, ending: set[int]) -> bool:
        kind, items = self._expressions[expression]
        if kind == _RULE:
            return items[0] in ending
        if kind == _SEQUENCE:
            return all(self._ends(item, ending) for item in items)
        if kind == _CHOICES:
            return any(self._ends(item, ending) for item in items)
        if kind == _REPEAT:
            return items[1] == 0 or items[0] in ending
        return True

    def _consumes(self, expression: int, consuming: set[int]) -> bool:
        kind, items = self._expressions[expression]
        if kind in (_RULE, _REPEAT):
            return items[0] in consuming
        if kind in (_SEQUENCE, _CHOICES):
            return any(self._consumes(item, consuming) for item in items)
        return kind != _EMPTY and not (kind == _STRING and not items)

    def _steps(
        self, expression: int, ending: set[int], consuming: set[int]
    ) -> list[tuple[int, bool]]:
        """Rules without end that an expression comes to first, and whether it read before."""
        kind, items = self._expressions[expression]
        if kind in (_RULE, _REPEAT):
            return [] if items[0] in ending else [(items[0], False)]
        if kind == _CHOICES:
            return [step for item in items for step in self._steps(item, ending, consuming)]
        read = False
        for item in items if kind == _SEQUENCE else ():
            if steps := self._steps(item, ending, consuming):
                return [(after, read or before) for after, before in steps]
            read = read or self._consumes(item, consuming)
        return []

    def reachable(self) -> Sequence[int]:
        """Rules that the root leads to."""
        return self._inner_first

    def _post_order(self) -> list[int]:
        order: list[int] = []
        seen = {self._root}
        stack = [(self._root, iter(self._mentioned(self._bodies[self._root])))]
        while stack:
            index, rest = stack[-1]
            after = next((each for each in rest if each not in seen), None)
            if after is None:
                order.append(index)
                stack.pop()
            else:
                seen.add(after)
                stack.append((after, iter(self._mentioned(self._bodies[after]))))
        return order

    def _mentioned(self, expression: int) -> list[int]:
        kind, items = self._expressions[expression]
        if kind in (_RULE, _REPEAT):
            return [items[0]]
        if kind in (_SEQUENCE, _CHOICES):
            return [rule for item in items for rule in self._mentioned(item)]
        return []

"""What sessions are to be: a pure model of them, against which services and servers are held.

It shares no code with what it judges: a session is a dictionary of versions, and a version is its
tokens and its messages. The chat template is ChatML without a form for tools. What a model answers
is for an oracle to say.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

START, END = "<|im_start|>", "<|im_end|>"
PROMPT = f"{START}assistant\n"


class RefusalError(Exception):
    """What a server is to say no to, by the error's type."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


@dataclass(frozen=True)
class Said:
    """A message."""

    role: str
    content: str
    calls: tuple[tuple[str, str, str], ...] = ()
    """Id, name and arguments (as JSON) of each."""
    answers: str | None = None
    """The id of the call that it is the result of."""
    raw: str | None = None
    """Of an answer: the text as generated."""

    def body(self) -> dict[str, Any]:
        """As a client sends it."""
        form: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.calls:
            form["tool_calls"] = [
                {"id": call, "type": "function", "function": {"name": name, "arguments": arguments}}
                for call, name, arguments in self.calls
            ]
        if self.answers is not None:
            form["tool_call_id"] = self.answers
        return form


@dataclass(frozen=True, eq=False)
class Version:
    """What a session was after one change."""

    number: int
    parent: Version | None
    tokens: tuple[int, ...] = ()
    said: tuple[Said, ...] = ()
    """Messages that the tokens stand for."""
    pending: tuple[Said, ...] = ()
    raw: bool = False
    """This change was text or tokens, which no message stands for."""

    def way(self) -> list[Version]:
        """From here to the first."""
        way = [self]
        while way[-1].parent is not None:
            way.append(way[-1].parent)
        return way


@dataclass
class Reference:
    """A session."""

    system: str | None
    encode: Callable[[str], list[int]]
    context: int
    """Most tokens of a prompt and its answer."""
    tip: Version
    newest: int = 0
    own: dict[int, Version] = field(default_factory=dict)
    """Versions that can be reached, by number."""
    kept: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = field(default_factory=list)
    """Under idempotency keys: operation, body, reply."""
    options: dict[str, Any] = field(default_factory=dict)
    rewrites: bool = False
    """The template renders the last message alone, so that each turn rewrites all before it."""

    @classmethod
    def opened(
        cls,
        encode: Callable[[str], list[int]],
        context: int,
        system: str | None = None,
        messages: Sequence[Said] = (),
        *,
        rewrites: bool = False,
    ) -> Reference:
        """A new session."""
        first = Version(0, None, pending=tuple(messages))
        return cls(system, encode, context, first, own={0: first}, rewrites=rewrites)

    def at(self, number: int) -> Version:
        """A version."""
        if number not in self.own:
            raise RefusalError("unknown_version")
        return self.own[number]

    def publish(self, version: Version) -> None:
        """Make a version the session's."""
        assert version.number == self.newest + 1
        self.own[version.number] = self.tip = version
        self.newest = version.number

    # ---- Prompts ----

    def prompt(self, new: Sequence[Said], at: Version | None = None) -> tuple[int, ...]:
        """All tokens that an answer to pending and new messages continues."""
        tip = at or self.tip
        ordered = in_call_order(tip, [*tip.pending, *new])
        if self.rewrites:
            if tip.tokens and any(each.raw for each in tip.way()):
                raise RefusalError("invalid_request")
            return tuple(self.encode(rendered(last_of(ordered)) + PROMPT))
        text = rendered(ordered) + PROMPT
        if tip.tokens:
            (end,) = self.encode(END)
            text = ("" if tip.tokens[-1] == end else END) + "\n" + text
        elif self.system is not None:
            text = turn("system", self.system) + text
        return (*tip.tokens, *self.encode(text))

    def answered(self, new: Sequence[Said]) -> tuple[int, ...]:
        """The prompt of an append, or why there is none."""
        if not new and not self.tip.pending:
            raise RefusalError("invalid_request")
        return self.fitting(self.prompt(new))

    def continued(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """The prompt of raw text or tokens, or why there is none."""
        if not self.tip.tokens and (self.system is not None or self.tip.pending):
            raise RefusalError("invalid_request")
        return self.fitting((*self.tip.tokens, *tokens))

    def fitting(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """The same, if it leaves room for an answer."""
        if len(prompt) >= self.context:
            raise RefusalError("context_length_exceeded")
        return prompt

    # ---- Changes ----

    def commit(
        self,
        prompt: Sequence[int],
        output: Sequence[int],
        new: Sequence[Said] | None,
        answer: Said,
    ) -> None:
        """A turn that ended well; `new` is None where text or tokens were appended."""
        tip, tokens = self.tip, (*prompt, *output)
        if new is None:
            said, pending = tip.said, tip.pending
        else:
            said = (*tip.said, *in_call_order(tip, [*tip.pending, *new]), answer)
            pending = ()
        number = self.newest + 1
        self.publish(Version(number, tip, tokens, said, pending, raw=new is None))

    def ingested(self, new: Sequence[Said]) -> Version:
        """What an ingest makes, or why it is refused; not published."""
        tip = self.tip
        calls = set(open_calls(tip, tip.pending))
        there = {each.answers for each in tip.pending if each.role == "tool"}
        for each in new:
            if each.role == "tool" and each.answers is not None:
                if each.answers in there or each.answers not in calls:
                    raise RefusalError("invalid_request")
                there.add(each.answers)
        self.fitting(self.prompt(new))
        pending = tuple(in_call_order(tip, [*tip.pending, *new]))
        return Version(self.newest + 1, tip, tip.tokens, tip.said, pending)

    def missing(self, pending: Sequence[Said]) -> list[str]:
        """Calls whose results are still to come."""
        answered = {each.answers for each in pending if each.role == "tool"}
        return [call for call in open_calls(self.tip, pending) if call not in answered]

    def edited(self, after: int, through: int | None, new: Sequence[Said]) -> Version:
        """What an edit makes, or why it is refused; not published."""
        parent, last = self.at(after), self.tip if through is None else self.at(through)
        way = self.tip.way()
        if parent not in way or last not in way or way.index(last) > way.index(parent):
            raise RefusalError("invalid_request")
        if any(each.raw for each in way[: way.index(parent)]):
            raise RefusalError("invalid_request")
        whole, gone = [*self.tip.said, *self.tip.pending], len(last.said) + len(last.pending)
        pending = (*parent.pending, *new, *whole[gone:])
        made = Version(self.newest + 1, parent, parent.tokens, parent.said, pending)
        if pending:
            self.fitting(self.prompt((), made))
        return made

    def fork(self, number: int) -> Reference:
        """Another session with this one's past."""
        tip = self.at(number)
        own = {each.number: each for each in tip.way()}
        return replace(self, tip=tip, newest=number, own=own, kept=[], options={**self.options})

    def copy(self) -> Reference:
        """The same session under another id, as an import makes it."""
        return replace(self, own={**self.own}, kept=[], options={**self.options})


def turn(role: str, content: str) -> str:
    """A message in ChatML."""
    return f"{START}{role}\n{content}{END}\n"


def rendered(messages: Sequence[Said]) -> str:
    """Messages in ChatML; calls and results as blocks of text."""
    text, results = "", []
    for at, each in enumerate(messages):
        if each.role == "tool":
            results.append(f"<tool_response>\n{each.content}\n</tool_response>")
            if at + 1 < len(messages) and messages[at + 1].role == "tool":
                continue
            text += turn("user", "\n".join(results))
            results = []
        else:
            text += turn(each.role, written(each))
    return text


def last_of(messages: Sequence[Said]) -> Sequence[Said]:
    """The last message as a template sees it: results that follow each other are one."""
    at = len(messages) - 1
    while at > 0 and messages[at].role == messages[at - 1].role == "tool":
        at -= 1
    return messages[at:]


def kept_of(tokens: Sequence[int], prompt: Sequence[int]) -> int:
    """How many tokens a prompt shares with what a session holds; its last one is always new."""
    shared = itertools.takewhile(lambda each: each[0] == each[1], zip(tokens, prompt, strict=False))
    return min(sum(1 for _ in shared), len(prompt) - 1)


def written(message: Said) -> str:
    """A message's text, calls included."""
    if message.raw is not None:
        return message.raw
    blocks = [
        f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n</tool_call>'
        for _, name, arguments in message.calls
    ]
    return "\n".join([message.content, *blocks] if message.content else blocks)


def open_calls(tip: Version, pending: Sequence[Said]) -> list[str]:
    """Calls that pending results may answer."""
    for each in reversed(pending):
        if each.role == "assistant":
            return [call for call, _, _ in each.calls]
    answered = set()
    for each in reversed(tip.said):
        if each.role == "assistant":
            return [call for call, _, _ in each.calls if call not in answered]
        if each.role != "tool":
            return []
        answered.add(each.answers)
    return []


def in_call_order(tip: Version, pending: Sequence[Said]) -> list[Said]:
    """Pending messages, results of the last answer's calls in the order of the calls."""
    calls = open_calls(tip, pending)
    last = max((at for at, each in enumerate(pending) if each.role == "assistant"), default=-1)
    ordered = list(pending)
    spots = [
        at
        for at, each in enumerate(pending)
        if at > last and each.role == "tool" and each.answers in calls
    ]
    results = sorted((pending[at] for at in spots), key=lambda each: calls.index(each.answers))
    for at, each in zip(spots, results, strict=True):
        ordered[at] = each
    return ordered

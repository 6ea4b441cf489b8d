"""Rules for hypothesis: everything that can be done to sessions, held against the reference.

Whom they are done to is a `Door`: a service in this process, or a server over HTTP. Bodies and
replies are those of the HTTP routes.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
from array import array
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from session_reference import Reference, RefusalError, Said, Version, kept_of

Body = dict[str, Any]
MOST_SESSIONS = 6
"""That a machine keeps at once: the second oldest is closed for another."""


class RefusedError(Exception):
    """The server said no."""

    def __init__(self, kind: str, error: Mapping[str, Any]) -> None:
        super().__init__(f"{kind}: {error.get('message')}")
        self.kind = kind
        self.error = error


class Door(Protocol):
    """Whom the rules are played to."""

    context: int
    """Most tokens of a prompt and its answer."""

    def encode(self, text: str) -> list[int]: ...

    async def call(self, operation: str, session: str | None, body: Body) -> Body:
        """Do something; `RefusedError` where the answer is an error."""
        ...

    async def abandon(
        self, operation: str, session: str, body: Body, moments: int, *, streamed: bool
    ) -> None:
        """Begin something and leave after a while, which a few `moments` make."""
        ...

    async def told(
        self, session: str, work: Callable[[], Awaitable[None]]
    ) -> list[tuple[str, int | None]]:
        """What a listener hears of a session, with the versions, while `work` does things to it.

        They are to end with the session's end.
        """
        ...

    async def arrived(self) -> None:
        """Until what was sent and abandoned is there, if it ever will be."""
        ...

    def check_answer(
        self, prompt: Sequence[int], output: Sequence[int], limit: int, finish: str | None
    ) -> None:
        """Fail unless the model's greedy answer to a prompt, of at most `limit` tokens, is this."""
        ...

    def text_of(self, output: Sequence[int]) -> str:
        """An answer as text, special tokens included, its end token left out."""
        ...


words = st.text("abc xyz", min_size=1, max_size=12)
users = st.lists(words.map(lambda text: Said("user", text)), min_size=1, max_size=2)
limits = st.integers(1, 12)
keyed = st.sampled_from([False, False, True])
touches = st.fixed_dictionaries(
    {},
    optional={
        "metadata": st.dictionaries(words, words, max_size=2),
        "retention": st.sampled_from(["none", "soft", "reserved"]),
        "priority": st.integers(-2, 2),
        "ttl_s": st.sampled_from([3600.0, 7200.0]),
    },
)
options = st.builds(
    lambda kept, private: {**kept, **private},
    touches,
    st.fixed_dictionaries({}, optional={"private": st.booleans()}),
)
UNSAID = {"metadata": {}, "retention": "soft", "priority": 0, "private": False}
"""What options are where nobody gave them."""
numbers = itertools.count()
"""Of keys and calls: a server outlives a machine, and remembers its keys."""
slots = picks = st.integers(0, 999)
"""What is picked by such a number depends on what there is; what is drawn does not: so an example's
draws are the same whatever a server does."""
T = TypeVar("T")


def one_of(choices: Sequence[T], pick: int) -> T:
    return choices[pick % len(choices)]


def tokens_of(form: Mapping[str, Any]) -> list[int]:
    ids = array("i")
    ids.frombytes(base64.b64decode(form["tokens"]))
    return ids.tolist()


class SessionRules(RuleBasedStateMachine):
    """All operations; what they are done to is made by `make_door`."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.door = self.make_door()
        self.reference: dict[str, Reference] = {}
        self.said = ""
        """The last error."""
        self.opening: list[tuple[str, Body, Body]] = []

    # ---- What a subclass says ----

    rewrites = False
    """The template renders the last message alone."""

    def make_door(self) -> Any:
        raise NotImplementedError

    # ---- How it is played ----

    def do(self, work: Coroutine[Any, Any, Any] | Awaitable[Any]) -> Any:
        async def run() -> Any:
            return await work

        return self.runner.run(run())

    def call(self, operation: str, session: str | None = None, /, **body: Any) -> Body:
        return self.do(self.door.call(operation, session, body))

    def tried(self, operation: str, session: str | None, body: Body) -> Body | str:
        """The reply, or the kind of error."""
        try:
            return self.do(self.door.call(operation, session, body))
        except RefusedError as refused:
            self.said = str(refused)
            return refused.kind

    def key(self, wanted: bool) -> Body:
        return {"idempotency_key": f"key-{next(numbers)}"} if wanted else {}

    def keep(self, operation: str, session: str | None, body: Body, reply: Body) -> None:
        if "idempotency_key" not in body:
            return
        kept = self.opening if session is None else self.reference[session].kept
        kept.append((operation, body, reply))

    def expected(self, make: Callable[[], Any], got: Body | str) -> Any:
        """What the reference makes of it; None where both refuse."""
        try:
            made = make()
        except RefusalError as refusal:
            refused = refusal.kind
        else:
            assert not isinstance(got, str), self.said
            return made
        assert got == refused, (got, refused)
        return None

    def changed(self, session: str, operation: str, body: Body, make: Callable[[], Version]) -> Any:
        """Play a change that generates nothing, and publish it."""
        got = self.tried(operation, session, body)
        made = self.expected(make, got)
        if made is not None:
            self.reference[session].publish(made)
            assert got["version"] == made.number
            self.keep(operation, session, body, got)
        return None if made is None else got

    # ---- Turns ----

    def content(self, new: Sequence[Said] | str | list[int]) -> Body:
        if isinstance(new, str):
            return {"text": new}
        if new and isinstance(new[0], int):
            return {"input_ids": list(new)}
        return {"messages": [each.body() for each in new]} if new else {}

    def prompt_of(self, session: str, new: Sequence[Said] | str | list[int]) -> tuple[int, ...]:
        reference = self.reference[session]
        if isinstance(new, str):
            return reference.continued(self.door.encode(new))
        if new and isinstance(new[0], int):
            return reference.continued(new)
        return reference.answered(new)

    def refuses(self, session: str, new: Sequence[Said] | str | list[int]) -> bool:
        """Whether nothing can be appended now, for want of room or of what to render."""
        try:
            self.prompt_of(session, new)
        except RefusalError:
            return True
        return False

    def turn_body(self, new: Any, limit: int, **more: Any) -> tuple[str, Body]:
        sampling = {"max_tokens": limit, "temperature": 0}
        content = self.content(new)
        operation = "append" if content else "generate"
        return operation, {**content, "sampling": sampling, "return_output_ids": True, **more}

    def check_turn(self, session: str, prompt: Sequence[int], limit: int, reply: Body) -> None:
        """A reply against the version that the reference is at."""
        reference = self.reference[session]
        usage, output = reply["usage"], reply["output_ids"]
        room = min(limit, reference.context - len(prompt))
        finish = None if reply["finish_reason"] == "tool_calls" else reply["finish_reason"]
        self.door.check_answer(prompt, output, room, finish)
        held, kept = len(reference.tip.tokens), kept_of(reference.tip.tokens, prompt)
        assert (usage["history_tokens"], usage["rewound_tokens"]) == (held, held - kept)
        assert usage["delta_tokens"] == len(prompt) - kept
        assert usage["cached_tokens"] + usage["computed_tokens"] == len(prompt)
        assert usage["generated_tokens"] == len(output)
        assert (usage["max_tokens"], usage["max_tokens_clipped"]) == (room, room < limit)

    def settle_turn(
        self, session: str, new: Any, limit: int, reply: Body, prompt: Sequence[int] | None = None
    ) -> None:
        """A committed turn, checked and taken over."""
        reference = self.reference[session]
        prompt = self.prompt_of(session, new) if prompt is None else prompt
        self.check_turn(session, prompt, limit, reply)
        assert reply["version"] == reference.newest + 1
        self.take_over(session, new, prompt, reply["output_ids"], reply["message"])

    def take_over(
        self, session: str, new: Any, prompt: Sequence[int], output: Sequence[int], message: Body
    ) -> None:
        calls = tuple(
            (call["id"], call["function"]["name"], call["function"]["arguments"])
            for call in message.get("tool_calls", ())
        )
        answer = Said("assistant", message["content"], calls, raw=self.door.text_of(output))
        raw = isinstance(new, str) or bool(new and isinstance(new[0], int))
        self.reference[session].commit(prompt, output, None if raw else new, answer)

    def play_turn(self, session: str, new: Any, limit: int, **more: Any) -> Body | None:
        operation, body = self.turn_body(new, limit, **more)
        got = self.tried(operation, session, body)
        prompt = self.expected(lambda: self.prompt_of(session, new), got)
        if prompt is None:
            return None
        if more.get("ephemeral"):
            self.check_turn(session, prompt, limit, got)
            assert got["version"] == self.reference[session].tip.number
        else:
            self.settle_turn(session, new, limit, got, prompt)
        self.keep(operation, session, body, got)
        return got

    def settle_abandoned(self, session: str, new: Any, limit: int) -> None:
        """Find out whether a turn whose client left was committed, and what it said."""
        reference = self.reference[session]
        view = self.do(self.quiet(session))
        if view["version"] == reference.tip.number:
            return
        assert view["version"] == reference.newest + 1
        prompt = self.prompt_of(session, new)
        form = self.call("export", session)["commits"][-1]
        assert form["version"] == view["version"]
        tokens = [*reference.tip.tokens[: form["base_len"]], *tokens_of(form)]
        output = tokens[len(prompt) :]
        assert tuple(tokens[: len(prompt)]) == prompt
        room = min(limit, reference.context - len(prompt))
        self.door.check_answer(prompt, output, room, view["finish_reason"])
        found = self.call("messages", session)["messages"]
        answer = found[-1] if found else {"content": ""}
        self.take_over(session, new, prompt, output, answer)

    async def quiet(self, session: str) -> Body:
        """The session once nobody writes it."""
        await self.door.arrived()
        for _ in range(2000):
            view = await self.door.call("get", session, {})
            if not view["busy"]:
                return view
            await asyncio.sleep(0.005)
        raise AssertionError("a session stays busy")

    # ---- Opening and closing ----

    @initialize(systems=st.lists(st.none() | words, min_size=3, max_size=3))
    def open_some(self, systems: list[str | None]) -> None:
        for each in systems:
            self.add_opened(each, [], False)

    @rule(system=st.none() | words, said=st.just([]) | users, key=keyed, kept=options)
    def open(self, system: str | None, said: list[Said], key: bool, kept: Body) -> None:
        self.add_opened(system, said, key, kept)

    @rule(calls=st.integers(1, 3), key=keyed)
    def open_with_calls(self, calls: int, key: bool) -> None:
        """A conversation that was begun elsewhere, and waits for the results of its calls."""
        named = tuple((f"call-{next(numbers)}", "look", f'{{"n": {at}}}') for at in range(calls))
        self.add_opened(None, [Said("user", "look"), Said("assistant", "so", named)], key)

    def add_opened(
        self, system: str | None, said: list[Said], key: bool, kept: Body | None = None
    ) -> None:
        self.make_room()
        body: Body = {**(kept or {}), **self.key(key)}
        if system is not None:
            body["system"] = system
        if said:
            body["messages"] = [each.body() for each in said]
        reply = self.call("open", None, **body)
        session = reply["id"]
        self.reference[session] = Reference.opened(
            self.door.encode, self.door.context, system, said, rewrites=self.rewrites
        )
        self.reference[session].options |= kept or {}
        self.keep("open", None, body, reply)

    def make_room(self) -> None:
        while len(self.reference) >= MOST_SESSIONS:
            self.end([*self.reference][1])

    def end(self, session: str, **query: Any) -> None:
        reference = self.reference.pop(session)
        reply = self.call("close", session, **query)
        assert reply["version"] == reference.tip.number
        assert self.tried("get", session, {}) == "session_not_found"

    def pick(self, slot: int) -> str:
        """One of the sessions, whatever number was drawn for it.

        Half of the time the oldest, so that much happens to it.
        """
        if not self.reference:
            self.add_opened(None, [], False)
        return one_of([*self.reference], slot // 2 if slot % 2 else 0)

    @rule(slot=slots, erase=st.booleans())
    def close(self, slot: int, erase: bool) -> None:
        session = one_of([*self.reference] or [self.pick(0)], slot)
        self.end(session, erase=erase)

    # ---- Turns ----

    @rule(slot=slots, new=users, limit=limits, key=keyed, streamed=st.booleans())
    def append(self, slot: int, new: list[Said], limit: int, key: bool, streamed: bool) -> None:
        session = self.pick(slot)
        self.play_turn(session, new, limit, stream=streamed, **self.key(key))

    @rule(slot=slots, limit=limits, key=keyed)
    def generate(self, slot: int, limit: int, key: bool) -> None:
        session = self.pick(slot)
        self.play_turn(session, [], limit, **self.key(key))

    @rule(slot=slots, new=words | st.lists(st.integers(3, 200), min_size=1), limit=limits)
    def append_raw(self, slot: int, new: Any, limit: int) -> None:
        session = self.pick(slot)
        self.play_turn(session, new, limit)

    @rule(slot=slots, new=users, repeats=st.integers(10, 60))
    def append_much(self, slot: int, new: list[Said], repeats: int) -> None:
        session = self.pick(slot)
        self.play_turn(session, [Said("user", new[0].content * repeats)], 3)

    @rule(slot=slots, new=st.just([]) | users, limit=limits, key=keyed)
    def ephemeral(self, slot: int, new: list[Said], limit: int, key: bool) -> None:
        session = self.pick(slot)
        self.play_turn(session, new, limit, ephemeral=True, **self.key(key))

    @rule(slot=slots, new=users, off=st.sampled_from([-1, 1]))
    def append_at_another_version(self, slot: int, new: list[Said], off: int) -> None:
        session = self.pick(slot)
        version = self.reference[session].tip.number
        _, body = self.turn_body(new, 3, expected_version=abs(version + off))
        got = self.tried("append", session, body)
        assert got == "version_mismatch", got

    @rule(
        slot=slots,
        new=users,
        limit=limits,
        moments=st.integers(0, 12),
        streamed=st.booleans(),
        key=keyed,
    )
    def abandon(
        self,
        slot: int,
        new: list[Said],
        limit: int,
        moments: int,
        streamed: bool,
        key: bool,
    ) -> None:
        """A client that leaves in the middle; with a key it comes back for its answer."""
        session = self.pick(slot)
        if self.refuses(session, new):
            return
        operation, body = self.turn_body(new, limit, stream=streamed, **self.key(key))
        self.do(self.door.abandon(operation, session, body, moments, streamed=streamed))
        if key:
            got = self.call(operation, session, **body)
            self.settle_turn(session, new, limit, got)
            self.keep(operation, session, body, got)
        else:
            self.settle_abandoned(session, new, limit)

    @rule(slot=slots, new=users, after=users, moments=st.integers(0, 6))
    def abandon_and_append_at_once(
        self, slot: int, new: list[Said], after: list[Said], moments: int
    ) -> None:
        """The next append is never told of a turn whose client left."""
        session = self.pick(slot)
        if self.refuses(session, new):
            return

        async def both() -> Body | str:
            operation, body = self.turn_body(new, 12)
            await self.door.abandon(operation, session, body, moments, streamed=False)
            operation, body = self.turn_body(after, 4, on_busy="fail")
            try:
                return await self.door.call(operation, session, body)
            except RefusedError as refused:
                return refused.kind

        got = self.do(both())
        if got == "context_length_exceeded":
            self.settle_abandoned(session, new, 12)
            return
        assert not isinstance(got, str), got
        reference = self.reference[session]
        if got["version"] == reference.newest + 2:
            self.settle_before(session, new, 12, got)
        self.settle_turn(session, after, 4, got)
        self.settle_abandoned(session, new, 12)  # it may have come second

    def settle_before(self, session: str, new: Any, limit: int, next_reply: Body) -> None:
        """A turn that nobody read, which another followed."""
        reference = self.reference[session]
        prompt = self.prompt_of(session, new)
        form = self.call("export", session)["commits"][-2]
        assert form["version"] == next_reply["version"] - 1
        tokens = [*reference.tip.tokens[: form["base_len"]], *tokens_of(form)]
        assert tuple(tokens[: len(prompt)]) == prompt
        output = tokens[len(prompt) :]
        room = min(limit, reference.context - len(prompt))
        self.door.check_answer(prompt, output, room, form["finish_reason"])
        found = self.call("messages", session, version=form["version"])["messages"]
        self.take_over(session, new, prompt, output, found[-1])

    @rule(
        slot=slots,
        news=st.lists(users, min_size=2, max_size=3),
        busy=st.sampled_from(["wait", "fail"]),
        beside=st.sampled_from(["ephemeral", "fork", "get", "ingest", "nothing"]),
    )
    def append_at_once(self, slot: int, news: list[list[Said]], busy: str, beside: str) -> None:
        """Writers wait for each other or are told; others are not held up and see a version."""
        session = self.pick(slot)
        self.at_once(session, news, busy, beside)

    def at_once(self, session: str, news: list[list[Said]], busy: str, beside: str) -> None:
        reference = self.reference[session]
        limit = 5
        if self.refuses(session, news[0]):
            return
        bodies = [self.turn_body(new, limit, on_busy=busy) for new in news]
        if beside == "ephemeral":
            bodies.append(self.turn_body(news[0], limit, ephemeral=True))
        elif beside == "ingest":
            bodies.append(("ingest", {"messages": [each.body() for each in news[0]]}))
        elif beside != "nothing":
            bodies.append((beside, {}))

        async def one(operation: str, body: Body) -> Body | str:
            try:
                return await self.door.call(operation, session, body)
            except RefusedError as refused:
                return refused.kind

        async def all_of_them() -> list[Body | str]:
            return await asyncio.gather(*(one(*each) for each in bodies))

        before = reference.tip
        found = self.do(all_of_them())
        turns = [*zip(news, found[: len(news)], strict=True)]
        extra = found[len(news)] if len(found) > len(news) else None
        done: list[tuple[int, Callable[[], None]]] = []
        for new, got in turns:
            if isinstance(got, str):
                assert got in ("context_length_exceeded", "session_busy"), got
                assert busy == "fail" or got == "context_length_exceeded"
            else:
                done.append(
                    (got["version"], lambda n=new, g=got: self.settle_turn(session, n, limit, g))
                )
        if beside == "ingest" and not isinstance(extra, str):
            done.append((extra["version"], lambda: reference.publish(reference.ingested(news[0]))))
        if busy == "wait" and not any(isinstance(got, str) for _, got in turns):
            assert len(done) >= len(news)
        for _, settle in sorted(done, key=lambda each: each[0]):
            settle()
        if beside == "ephemeral" and not isinstance(extra, str):
            at = before if extra["version"] == before.number else reference.at(extra["version"])
            prompt = reference.prompt(news[0], at)
            room = min(limit, reference.context - len(prompt))
            self.door.check_answer(prompt, extra["output_ids"], room, extra["finish_reason"])
            assert extra["usage"]["history_tokens"] == len(at.tokens)
        if beside == "fork":
            self.forked_beside(session, extra)
        self.same(session)

    def forked_beside(self, session: str, view: Body | str) -> None:
        """A fork made while its source ran, held to the version that it says it is of."""
        assert not isinstance(view, str), view
        fork = self.reference[session].fork(view["version"])
        self.reference[view["id"]] = fork
        assert view["tokens"] == len(fork.tip.tokens)
        self.play_turn(view["id"], "go on" if fork.tip.tokens else [Said("user", "go on")], 4)
        self.end(view["id"])

    # ---- Tools ----

    @rule(slot=slots, order=st.permutations(range(3)), taken=st.integers(1, 3), key=keyed)
    def ingest_results(self, slot: int, order: list[int], taken: int, key: bool) -> None:
        """Results of the open calls in any order, some or all."""
        session = self.pick(slot)
        reference = self.reference[session]
        missing = reference.missing(reference.tip.pending)
        results = [
            Said("tool", f"result {at}", answers=missing[at]) for at in order if at < len(missing)
        ][:taken]
        if results:
            self.ingest(session, results, key)

    @rule(slot=slots, new=users, key=keyed)
    def ingest_messages(self, slot: int, new: list[Said], key: bool) -> None:
        session = self.pick(slot)
        self.ingest(session, new, key)

    @rule(slot=slots, call=st.sampled_from(["call-0", "nobody's"]))
    def ingest_what_nobody_called_for(self, slot: int, call: str) -> None:
        session = self.pick(slot)
        self.ingest(session, [Said("tool", "x", answers=call)], False)

    def ingest(self, session: str, new: list[Said], key: bool) -> None:
        reference = self.reference[session]
        body = {"messages": [each.body() for each in new], **self.key(key)}
        got = self.changed(session, "ingest", body, lambda: reference.ingested(new))
        if got is not None:
            pending = reference.tip.pending
            assert got["pending"] == len(pending)
            assert got["missing"] == reference.missing(pending)
            assert got["computed_tokens"] >= 0
            prompt = reference.prompt(())
            assert 0 <= got["ready_tokens"] <= len(prompt) - kept_of(reference.tip.tokens, prompt)

    # ---- Versions ----

    @rule(slot=slots, pick=picks, key=keyed, kept=st.just({}) | options)
    def fork(self, slot: int, pick: int, key: bool, kept: Body) -> None:
        session = self.pick(slot)
        reference = self.reference[session]
        version = one_of([None, None, *reference.own, 99], pick)
        body: Body = {**({} if version is None else {"version": version}), **kept, **self.key(key)}
        got = self.tried("fork", session, body)
        number = reference.tip.number if version is None else version
        forked = self.expected(lambda: reference.fork(number), got)
        if forked is None:
            return
        self.keep("fork", session, body, got)
        forked.options |= kept
        self.reference[got["id"]] = forked
        self.make_room()

    @rule(slot=slots, pick=picks, key=keyed)
    def roll_back(self, slot: int, pick: int, key: bool) -> None:
        session = self.pick(slot)
        reference = self.reference[session]
        self.go_to(session, one_of([*reference.own, 99], pick), key)

    def go_to(self, session: str, version: int, key: bool = False) -> None:
        reference = self.reference[session]
        body = {"version": version, **self.key(key)}
        got = self.tried("rollback", session, body)
        tip = self.expected(lambda: reference.at(version), got)
        if tip is not None:
            reference.tip = tip
            assert (got["version"], got["tokens"]) == (version, len(tip.tokens))
            self.keep("rollback", session, body, got)

    @rule(slot=slots, one=users, other=users, then=words | users, limit=limits)
    def roll_to_and_fro(
        self, slot: int, one: list[Said], other: list[Said], then: Any, limit: int
    ) -> None:
        """Two continuations of a version; the first goes on after the second was computed."""
        session = self.pick(slot)
        reference = self.reference[session]
        start = reference.tip.number
        self.play_turn(session, one, limit)
        first = reference.tip.number
        self.go_to(session, start)
        self.play_turn(session, other, limit)
        self.go_to(session, first)
        self.play_turn(session, then, limit)

    @rule(slot=slots, new=st.just([]) | users, pick=picks, key=keyed)
    def edit(self, slot: int, new: list[Said], pick: int, key: bool) -> None:
        session = self.pick(slot)
        reference = self.reference[session]
        after = one_of([*reference.own], pick)
        through = one_of([None, *reference.own], pick // 10)
        body: Body = {"after": after, "messages": [each.body() for each in new], **self.key(key)}
        if through is not None:
            body["through"] = through
        self.changed(session, "edit", body, lambda: reference.edited(after, through, new))

    @rule(slot=slots, kept=touches)
    def touch(self, slot: int, kept: Body) -> None:
        session = self.pick(slot)
        got = self.call("touch", session, **kept)
        self.reference[session].options |= kept
        assert {name: got[name] for name in kept} == kept

    @rule(slot=slots, key=keyed)
    def move(self, slot: int, key: bool) -> None:
        """Export and import: the same session under another id."""
        session = self.pick(slot)
        exported = self.exported(session)
        body: Body = {"session": exported, **self.key(key)}
        got = self.call("import", None, **body)
        self.reference[got["id"]] = self.reference[session].copy()
        self.keep("import", None, body, got)
        self.make_room()

    @rule(slot=slots, new=words)
    def detach(self, slot: int, new: str) -> None:
        """A detached turn is committed though its client leaves as soon as it has begun."""
        session = self.pick(slot)
        said = [Said("user", new)]
        if self.refuses(session, said):
            return
        self.leave_detached(session, said)
        before = self.reference[session].newest
        self.settle_abandoned(session, said, 9)
        assert self.reference[session].newest == before + 1

    def leave_detached(self, session: str, said: list[Said]) -> None:
        """Begin a detached turn of at most 9 tokens, leave it, and wait for its end."""
        raise NotImplementedError

    # ---- Keys ----

    @rule(slot=slots, pick=picks)
    def repeat(self, slot: int, pick: int) -> None:
        """What was asked under a key is answered as then, whatever happened since."""
        session = self.pick(slot)
        kept = self.reference[session].kept
        if not kept:
            return
        operation, body, reply = one_of(kept, pick)
        assert self.call(operation, session, **body) == reply

    @rule(pick=picks)
    def repeat_an_opening(self, pick: int) -> None:
        if self.opening:
            operation, body, reply = one_of(self.opening, pick)
            assert self.call(operation, None, **body) == reply

    @rule(slot=slots, pick=picks)
    def take_a_key_for_another_request(self, slot: int, pick: int) -> None:
        session = self.pick(slot)
        kept = self.reference[session].kept
        if not kept:
            return
        _, body, _ = one_of(kept, pick)
        _, other = self.turn_body([Said("user", "something else")], 7)
        got = self.tried("append", session, {**other, "idempotency_key": body["idempotency_key"]})
        assert got == "idempotency_key_reused", got

    # ---- What there is ----

    def exported(self, session: str) -> Body:
        """Every version token by token."""
        reference = self.reference[session]
        found = self.call("export", session)
        assert (found["version"], found["newest"]) == (reference.tip.number, reference.newest)
        tokens: dict[int, list[int]] = {}
        for form in found["commits"]:
            parent = reference.own[form["version"]].parent
            assert form["parent"] == (None if parent is None else parent.number)
            before = tokens[form["parent"]] if parent is not None else []
            tokens[form["version"]] = before[: form["base_len"]] + tokens_of(form)
        assert tokens == {each.number: list(each.tokens) for each in reference.own.values()}
        return found

    def same(self, session: str) -> None:
        """One session as it is said to be."""
        reference = self.reference[session]
        view = self.call("get", session)
        tip = reference.tip
        found = (view["version"], view["tokens"])
        assert found == (tip.number, len(tip.tokens)), found
        assert view["messages"] == len(tip.said)
        kept = {**UNSAID, **reference.options}
        assert {name: view[name] for name in kept} == kept
        assert not view["busy"]
        found = self.call("messages", session)
        for name, messages in (("messages", tip.said), ("pending", tip.pending)):
            said = [(each["role"], each["content"]) for each in found[name]]
            assert said == [(each.role, each.content) for each in messages]

    @rule(slot=slots, pick=picks)
    def read(self, slot: int, pick: int) -> None:
        session = self.pick(slot)
        self.exported(session)
        reference = self.reference[session]
        version = one_of([*reference.own], pick)
        found = self.call("messages", session, version=version)
        said = [each["content"] for each in found["messages"]]
        assert said == [each.content for each in reference.at(version).said]

    @rule()
    def all_are_the_same(self) -> None:
        for session in self.reference:
            self.same(session)

    @rule(limit=st.integers(1, 4))
    def list_them(self, limit: int) -> None:
        """Every session is on one page of the list, whatever its length."""
        found: list[Body] = []
        page: Body = {"next": None}
        while page["next"] is not None or not found:
            after = {} if page["next"] is None else {"after": page["next"]}
            page = self.call("list", None, limit=limit, **after)
            found += page["sessions"]
            limit = max(limit, page["total"] // 4)
            if not page["sessions"]:
                break
        assert len({each["id"] for each in found}) == len(found) == page["total"]
        listed = {each["id"]: (each["version"], each["tokens"]) for each in found}
        said = {
            session: (reference.tip.number, len(reference.tip.tokens))
            for session, reference in self.reference.items()
        }
        assert said == {session: listed.get(session) for session in said}

    @rule(slot=slots, new=users, limit=limits)
    def listen(self, slot: int, new: list[Said], limit: int) -> None:
        """A listener is told all that happens; here to a fork, which lives for this alone."""
        session = self.pick(slot)
        tip = self.reference[session].tip
        refused = self.refuses(session, new)
        fork = self.call("fork", session)["id"]
        operation, body = self.turn_body(new, limit)
        replies: list[Body] = []

        async def work() -> None:
            await self.door.call("touch", fork, {"metadata": {}})
            try:
                replies.append(await self.door.call(operation, fork, body))
            except RefusedError:
                assert refused
            await self.door.call("rollback", fork, {"version": tip.number})
            await self.door.call("close", fork, {})

        heard = self.do(self.door.told(fork, work))
        turn = [("turn.started", tip.number), ("turn.committed", tip.number + 1)]
        before = [("listening", tip.number), ("touched", tip.number)]
        after = [("rolled_back", tip.number), ("closed", tip.number)]
        assert heard == [*before, *(() if refused else turn), *after]
        for reply in replies:
            self.check_turn(session, self.prompt_of(session, new), limit, reply)

"""The prefix tree against a naive reference: any order of operations, everything recounted."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)
from prefix_rig import Rig
from sglang.srt.mem_cache.radix_cache import RadixKey

from stateful_sglang.prefix.policies import POLICIES
from stateful_sglang.session.rank import RankTurnKind

# Few different tokens, so that paths share prefixes and split all the time.
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=9)


class Session:
    """What a session should be: its transcript, and how much of it the tree was told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.transcript: list[int] = []
        self.covered = 0
        self.busy = False


class CardinalTreeMachine(RuleBasedStateMachine):
    """A session covers a node if the node's path is a prefix of what the session covers."""

    requests = Bundle("requests")
    page_size = 1

    @initialize(
        pin_budget=st.sampled_from([0.0, 0.3, 0.6, 1.0]), policy=st.sampled_from(list(POLICIES))
    )
    def build(self, pin_budget: float, policy: str) -> None:
        self.rig = Rig(
            pool_tokens=96,
            page_size=self.page_size,
            pin_budget=pin_budget,
            eviction_policy=policy,
        )
        self.rig.after_eviction = self.forget_evicted
        self.sessions: dict[str, Session] = {}
        self.checked: dict[str, int] = {}
        self.opened = 0

    def forget_evicted(self) -> None:
        for session in self.sessions.values():
            session.covered = self.rig.cached(session.transcript[: session.covered])

    def aligned(self, tokens: int) -> int:
        return tokens // self.page_size * self.page_size

    def idle(self) -> list[Session]:
        return [session for session in self.sessions.values() if not session.busy]

    def open(self) -> Session:
        self.opened += 1
        session = self.sessions[f"s{self.opened}"] = Session(f"s{self.opened}")
        return session

    @rule(
        target=requests,
        delta=TOKENS,
        kept=st.floats(0, 1),
        whole=st.booleans(),
        kind=st.sampled_from(["turn", "prefill"]),
        data=st.data(),
    )
    def start_turn(
        self, delta: list[int], kept: float, whole: bool, kind: RankTurnKind, data: st.DataObject
    ) -> Any:
        idle = self.idle()
        chosen = data.draw(st.integers(0, len(idle)), label="session")
        if chosen < len(idle):
            session = idle[chosen]
        elif len(self.sessions) < 5:
            session = self.open()
        else:
            return multiple()
        base = len(session.transcript) if whole else int(kept * len(session.transcript))
        session.transcript = session.transcript[:base]
        session.covered = min(session.covered, self.aligned(base))
        req = self.rig.start([*session.transcript, *delta], session.name, base, kind)
        if req is None:
            return multiple()
        self.settle_prefill(session, base)
        session.busy = True
        return req

    @precondition(lambda self: self.sessions)
    @rule(target=requests, delta=TOKENS, kept=st.floats(0, 1), data=st.data())
    def start_ephemeral(self, delta: list[int], kept: float, data: st.DataObject) -> Any:
        session = self.sessions[data.draw(st.sampled_from(sorted(self.sessions)))]
        base = int(kept * len(session.transcript))
        prompt = [*session.transcript[:base], *delta]
        req = self.rig.start(prompt, session.name, base, "ephemeral")
        return req if req is not None else multiple()

    @precondition(lambda self: self.sessions and len(self.sessions) < 5)
    @rule(kept=st.floats(0, 1), data=st.data())
    def fork(self, kept: float, data: st.DataObject) -> None:
        source = self.sessions[data.draw(st.sampled_from(sorted(self.sessions)))]
        length = int(kept * len(source.transcript))
        session = self.open()
        session.transcript = source.transcript[:length]
        session.covered = min(source.covered, self.aligned(length))
        self.rig.tree.fork_session(source.name, session.name, length)

    @rule(kept=st.floats(0, 1), data=st.data())
    def roll_back(self, kept: float, data: st.DataObject) -> None:
        idle = self.idle()
        if not idle:
            return
        session = data.draw(st.sampled_from(idle))
        length = int(kept * len(session.transcript))
        session.transcript = session.transcript[:length]
        session.covered = min(session.covered, self.aligned(length))
        self.rig.tree.truncate_session(session.name, length)

    def settle_prefill(self, session: Session, base: int) -> None:
        if self.aligned(base) - session.covered > self.page_size:
            session.covered = self.aligned(base)

    @rule(target=requests, prompt=TOKENS)
    def start_plain(self, prompt: list[int]) -> Any:
        req = self.rig.start(prompt)
        return req if req is not None else multiple()

    @rule(req=requests, tokens=TOKENS)
    def decode(self, req: Any, tokens: list[int]) -> None:
        turn = self.rig.turns.get(req.rid)
        if req in self.rig.running and (turn is None or turn.kind != "prefill"):
            self.rig.decode(req, tokens)

    @rule(req=consumes(requests), share=st.floats(0, 1))
    def finish(self, req: Any, share: float) -> None:
        if req not in self.rig.running:
            return
        turn = self.rig.turns.get(req.rid)
        generated = list(req.output_ids)
        computed = req.kv.kv_committed_len
        # A stop lies among the tokens since the last check; what a resumed request had was checked.
        delivered = max(round(share * len(generated)), self.checked.get(req.rid, 0))
        if turn is not None and turn.kind == "prefill":
            delivered = 0
        self.rig.finish(req, delivered)
        if turn is not None and turn.kind != "ephemeral":
            session = self.sessions[turn.session_id]
            session.transcript = [*req.origin_input_ids, *generated[:delivered]]
            session.covered = self.aligned(min(computed, len(session.transcript)))
            session.busy = False

    @rule(req=consumes(requests), nan=st.booleans())
    def end_badly(self, req: Any, nan: bool) -> None:
        if req in self.rig.running:
            turn = self.rig.turns.get(req.rid)
            (self.rig.fail if nan else self.rig.abort)(req)
            if turn is not None and turn.kind != "ephemeral":
                self.sessions[turn.session_id].busy = False

    @rule(req=requests, wanted=st.integers(0, 40))
    def retract_and_resume(self, req: Any, wanted: int) -> None:
        if req not in self.rig.running:
            return
        turn = self.rig.turns.get(req.rid)
        self.rig.retract(req)
        self.rig.evict(wanted)
        self.checked[req.rid] = len(req.output_ids)
        resumed = self.rig.admit(req)
        if turn is not None and turn.kind != "ephemeral":
            session = self.sessions[turn.session_id]
            session.busy = resumed
            if resumed:
                self.settle_prefill(session, turn.base_len)

    @rule(tokens=TOKENS)
    def refresh_a_waiting_request(self, tokens: list[int]) -> None:
        self.rig.tree.touch_prefix(RadixKey(array("q", tokens)))

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.sessions)), label="session")
        del self.sessions[name]
        for rid, turn in self.rig.turns.items():
            if turn.session_id == name:  # as the rank's sessions let it go on alone
                self.rig.turns[rid] = turn._replace(kind="ephemeral")
        self.rig.tree.release_session_leaf(name)

    @rule(tokens=st.integers(0, 60))
    def evict(self, tokens: int) -> None:
        evictable = self.rig.tree.evictable_size()
        assert self.rig.evict(tokens) >= min(tokens, evictable)

    @precondition(lambda self: not self.rig.running)
    @rule()
    def flush(self) -> None:
        self.rig.flush()
        self.forget_evicted()

    @invariant()
    def accounts_balance(self) -> None:
        if hasattr(self, "rig"):
            self.rig.check()

    @invariant()
    def every_node_counts_its_sessions(self) -> None:
        if not hasattr(self, "rig"):
            return
        for node, path in walk(self.rig.tree.tree_core.root_node, []):
            expected = sum(
                len(path) <= session.covered and session.transcript[: len(path)] == path
                for session in self.sessions.values()
            )
            assert node.cardinality == expected, f"node {path}"
        for session in self.sessions.values():
            assert (
                sum(n.tokens for n in self.rig.tree.session_path(session.name)) == session.covered
            )


def walk(node: Any, path: list[int]) -> Any:
    """Every node below, with the tokens from the root to its end."""
    for child in node.children.values():
        tokens = [*path, *child.key.token_ids]
        yield child, tokens
        yield from walk(child, tokens)


class PagedTreeMachine(CardinalTreeMachine):
    """The same with pages of several tokens, which a leaf never cuts."""

    page_size = 4


TestCardinalTree = CardinalTreeMachine.TestCase
TestPagedTree = PagedTreeMachine.TestCase
for case in (TestCardinalTree, TestPagedTree):
    case.settings = settings(
        max_examples=60,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


@pytest.mark.slow
def test_fifty_thousand_steps() -> None:
    """1,000 runs of 50 steps."""
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        CardinalTreeMachine,
        settings=settings(max_examples=1000, stateful_step_count=50, deadline=None),
    )

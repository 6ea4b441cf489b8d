"""What is done to sessions before and after a kill: random operations, each under a key.

A lane is one client that does one thing after another to its session and a fork of it. All that is
asked follows from a seed, so that an uninterrupted twin can be asked the same.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from one_tenant import ME

from stateful_sglang.service.commands import (
    Append,
    Edit,
    Fork,
    Ingest,
    Key,
    NewMessages,
    OpenSession,
    Rollback,
    Writing,
)
from stateful_sglang.service.results import Ingested, TurnResult
from stateful_sglang.service.sampling import Sampling
from stateful_sglang.service.service import SessionService
from stateful_sglang.session.messages import Head, Message

Kind = Literal["open", "append", "ephemeral", "ingest", "fork", "rollback", "edit"]
OPERATIONS = 9
LANES = 3


class Op(NamedTuple):
    """One operation of a lane."""

    kind: Kind
    which: int = 0
    """Of the lane's sessions, in the order in which it got them."""
    text: str = ""
    version: int = 0


@dataclass
class _Model:
    """Versions of a session, as far as is needed to name some that are there."""

    way: list[int] = field(default_factory=lambda: [0])
    newest: int = 0

    def grow(self) -> None:
        self.newest += 1
        self.way.append(self.newest)

    def cut(self, version: int) -> None:
        del self.way[self.way.index(version) + 1 :]


def lane(seed: int, number: int) -> list[Op]:
    """The operations of a lane: an opening, then what chance says."""
    rng = random.Random(f"{seed} {number}")
    ops, sessions = [Op("open", text="be brief")], [_Model()]
    kinds: Sequence[Kind] = ("append", "ephemeral", "ingest", "fork", "rollback", "edit")
    while len(ops) < OPERATIONS:
        (kind,) = rng.choices(kinds, (8, 1, 2, 1, 1, 1))
        which = rng.randrange(len(sessions))
        model = sessions[which]
        text = f"{number}.{len(ops)}: " + "x" * rng.choice((3, 40, 400))
        version = rng.choice(model.way)
        if kind in ("append", "ingest"):
            model.grow()
        elif kind == "fork" and len(sessions) < 3:
            sessions.append(_Model(model.way[: model.way.index(version) + 1], version))
        elif kind == "rollback":
            model.cut(version)
        elif kind == "edit" and len(model.way) > 1:
            model.cut(version := rng.choice(model.way[:-1]))
            model.grow()
        elif kind != "ephemeral":
            continue
        ops.append(Op(kind, which, text, version))
    return ops


class Client:
    """A lane's client: it knows the ids of its sessions from the answers it got."""

    def __init__(self, service: SessionService, number: int) -> None:
        self._service = service
        self._number = number
        self.ids: list[str] = []

    async def do(self, at: int, op: Op) -> dict[str, Any]:
        """Ask for an operation, again or for the first time; what of its answer is comparable."""
        answer = await self._asked(Key(f"{self._number}-{at}", repr(op)), op)
        if isinstance(answer, TurnResult):
            return {
                "version": answer.version,
                "text": answer.text,
                "ids": answer.output_ids.tolist(),
                "history": answer.usage.history_tokens,
            }
        if isinstance(answer, Ingested):
            return {"version": answer.version, "pending": answer.pending}
        return {"version": answer.version, "tokens": answer.tokens, "messages": answer.messages}

    async def _asked(self, key: Key, op: Op) -> Any:
        service, writing, said = self._service, Writing(key=key), (Message("user", op.text),)
        if op.kind in ("open", "fork"):
            view = await (
                service.open(ME, OpenSession(Head(op.text), key=key))
                if op.kind == "open"
                else service.fork(ME, self.ids[op.which], Fork(op.version, key=key))
            )
            if view.id not in self.ids:
                self.ids.append(view.id)
            return view
        session_id = self.ids[op.which]
        if op.kind in ("append", "ephemeral"):
            command = Append(
                NewMessages(said),
                Sampling(max_tokens=12),
                writing=writing,
                ephemeral=op.kind == "ephemeral",
            )
            reader = await service.append(ME, session_id, command)
            return await reader.result()
        simple: Mapping[str, Callable[[], Awaitable[Any]]] = {
            "ingest": lambda: service.ingest(ME, session_id, Ingest(said, writing)),
            "rollback": lambda: service.rollback(ME, session_id, Rollback(op.version, writing)),
            "edit": lambda: service.edit(ME, session_id, Edit(op.version, said, writing=writing)),
        }
        return await simple[op.kind]()

    async def seen(self, which: int) -> dict[str, Any]:
        """All that there is of a session, without what no twin shares."""
        found = await self._service.export(ME, self.ids[which])
        commits = {
            str(commit["version"]): {k: v for k, v in commit.items() if k != "created_at"}
            for commit in found["commits"]
        }
        return {"version": found["version"], "newest": found["newest"], "commits": commits}

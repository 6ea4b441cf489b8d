"""Prefixes that all tenants share: which there are, made and removed one at a time.

Who may do so is decided in front of the routes. The journal keeps them, so that a server which is
started again publishes them again. Ranks learn them at once, their KV is computed by the first
requests that begin with them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Literal, NamedTuple

from stateful_sglang.service.commands import Publish
from stateful_sglang.service.core import Core, journal_errors
from stateful_sglang.service.engine import EngineError
from stateful_sglang.service.failures import not_done
from stateful_sglang.session.errors import PrefixNotFoundError, PublishRefusedError
from stateful_sglang.session.ids import new_rid
from stateful_sglang.session.records import PrefixRecord

logger = logging.getLogger(__name__)

PrefixState = Literal["published", "waiting", "refused", "other_model"]
"""``published`` all share it; the others were published before the server was started again:
``waiting`` it will be shared as soon as the model server answers; ``refused`` there is no room for
it, until another is removed; ``other_model`` its tokens are of another model or chat template."""


class PrefixView(NamedTuple):
    """A published prefix."""

    id: str
    name: str | None
    state: PrefixState
    problem: str | None
    """Why it is refused."""
    tokens: int
    aligned_tokens: int
    """How many of them are shared: whole pages of the KV pool, and none unless published."""
    created_at: float


@dataclass
class _Prefix:
    record: PrefixRecord
    state: PrefixState
    aligned: int = 0
    problem: str | None = None

    def view(self) -> PrefixView:
        record = self.record
        return PrefixView(
            record.id,
            record.name,
            self.state,
            self.problem,
            len(record.tokens),
            self.aligned,
            record.created_at,
        )


class Prefixes:
    """What is published."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._known: dict[str, _Prefix] = {}
        """In the order of their publication."""
        self._loaded = False
        self._changing = asyncio.Lock()

    async def publish(self, command: Publish) -> PrefixView:
        """Publish a prefix and compute its KV; what is published already is answered as it is.

        It is done to its end even if the caller leaves.

        Raises:
            InvalidInputError: It can't be rendered, or comes to nothing.
            ContextOverflowError: It doesn't fit.
            PublishRefusedError: There is no room for it beside the others.
            EngineFailedError: It could not be computed; nothing is published.
            JournalFailedError: It could not be recorded; nothing is published.
        """
        self._core.check_accepting()
        tokens = await self._core.planner.prefix(command.content)
        record = PrefixRecord(
            new_rid(), command.name, self._core.engine.model_digest, tokens, time.time()
        )
        return await self._core.finish(self._publish(record))

    async def list(self) -> tuple[PrefixView, ...]:
        """All of them, the oldest first.

        Raises:
            JournalFailedError: Those of before the server's start can't be read.
        """
        await self._load()
        return tuple(each.view() for each in self._known.values())

    async def remove(self, prefix_id: str) -> PrefixView:
        """Publish a prefix no longer; how it was.

        Raises:
            PrefixNotFoundError: There is none of this id.
            JournalFailedError: That could not be recorded; it is published still.
        """
        return await self._core.finish(self._remove(prefix_id))

    async def restore(self) -> None:
        """Publish what was published before the server was started again.

        Costs nothing where all is done already. What can't be done is tried again the next time.
        """
        try:
            await self._load()
            for each in [each for each in self._known.values() if each.state == "waiting"]:
                async with self._changing:
                    if each.state == "waiting" and each.record.id in self._known:
                        await self._share(each, compute=False)
                        self._tell()
        except EngineError as error:
            logger.warning("published prefixes wait to be published again: %s", error)

    async def _publish(self, record: PrefixRecord) -> PrefixView:
        await self.restore()  # those that were here before have the first claim to the room
        async with self._changing:
            same = self._same(record)
            made = same or _Prefix(record, "waiting")
            if made.state != "published":
                try:
                    await self._share(made, compute=True)
                except EngineError as error:
                    raise not_done(error) from error
                if made.problem is not None:
                    raise PublishRefusedError(made.problem)
            if same is None:
                await self._record(made)
            self._tell()
            return made.view()

    async def _record(self, made: _Prefix) -> None:
        """Keep a prefix that is shared already, or share it no longer."""
        prefix_id = made.record.id
        try:
            with journal_errors("the prefix could not be recorded, and is not published"):
                await self._core.journal.publish(made.record)
        except BaseException:
            await self._core.engine.unpublish_prefix(prefix_id)
            raise
        self._known[prefix_id] = made

    async def _remove(self, prefix_id: str) -> PrefixView:
        await self._load()
        async with self._changing:
            if prefix_id not in self._known:
                raise PrefixNotFoundError(prefix_id)
            with journal_errors("the removal could not be recorded, and it is published still"):
                await self._core.journal.unpublish(prefix_id)
            removed = self._known.pop(prefix_id)
            if removed.state == "published":
                await self._core.engine.unpublish_prefix(prefix_id)
            for each in self._known.values():
                if each.state == "refused":  # there may be room now
                    each.state = "waiting"
            self._tell()
            return removed.view()

    async def _load(self) -> None:
        """Read what the journal has of them, once."""
        if self._loaded:
            return
        with journal_errors("the published prefixes can't be read"):
            records = await self._core.journal.prefixes()
        if self._loaded:  # by somebody else meanwhile
            return
        self._loaded = True
        for record in records:
            same_model = record.model == self._core.engine.model_digest
            state: PrefixState = "waiting" if same_model else "other_model"
            self._known[record.id] = _Prefix(record, state)

    async def _share(self, prefix: _Prefix, *, compute: bool) -> None:
        """Have the ranks share a prefix; it is published then, or refused.

        Raises:
            EngineError: They did not answer, or not compute it; it is as before.
        """
        record = prefix.record
        answer = await self._core.engine.publish_prefix(record.id, record.tokens, compute=compute)
        prefix.problem = answer.problem
        if answer.problem is None:
            prefix.state, prefix.aligned = "published", answer.aligned_tokens
        else:
            prefix.state = "refused"

    def _same(self, record: PrefixRecord) -> _Prefix | None:
        """The known prefix of the same model and tokens."""
        for each in self._known.values():
            if each.record.model == record.model and each.record.tokens == record.tokens:
                return each
        return None

    def _tell(self) -> None:
        shared = [each.aligned for each in self._known.values() if each.state == "published"]
        self._core.observer.prefixes(len(shared), sum(shared))

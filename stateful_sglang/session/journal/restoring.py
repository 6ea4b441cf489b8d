"""From rows to histories that share what sessions in memory hold. On the event loop: it alone grows
shared buffers. It is left to others every few commits."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from weakref import WeakValueDictionary

from stateful_sglang.session.conversation import Conversation
from stateful_sglang.session.history import Commit, History, UnknownVersionError
from stateful_sglang.session.journal.codec import DamagedError
from stateful_sglang.session.journal.reading import StoredCommit, StoredHistory
from stateful_sglang.session.messages import Head
from stateful_sglang.session.transcript import Transcript

_COMMITS_AT_ONCE = 200
"""Made in one go: some five milliseconds."""


class Restorer:
    """Builds histories; commits and heads that are still in memory are taken, not made again."""

    def __init__(self) -> None:
        self._commits: WeakValueDictionary[tuple[str, int], Commit] = WeakValueDictionary()
        self._heads: WeakValueDictionary[str, Head] = WeakValueDictionary()

    def remember(self, commit: Commit) -> None:
        """A commit was recorded, and is in memory as long as somebody holds it."""
        self._commits.setdefault((commit.owner, commit.version), commit)
        self._heads.setdefault(commit.conversation.head.key, commit.conversation.head)

    def history(self, stored: StoredHistory) -> History:
        """The history of what was read.

        Raises:
            DamagedError: It makes up none.
        """
        steps = self.steps(stored)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                history: History = end.value
                return history

    def steps(self, stored: StoredHistory) -> Generator[None, None, History]:
        """The same, in steps between which other histories may be made or grow.

        Raises:
            DamagedError: It makes up none.
        """
        made: dict[int, Commit] = {}
        for number, row in enumerate(stored.commits):
            if number and number % _COMMITS_AT_ONCE == 0:
                yield
            made[row.id] = self._commit(row, made, stored)
        origin = made.get(stored.origin)
        if origin is None:
            raise DamagedError("the commit that the session begins with is missing")
        own = [each for each in made.values() if each.owner == stored.owner]
        published = sorted(
            (each for each in own if each.version > origin.version), key=lambda each: each.version
        )
        try:
            return History.restored(stored.owner, origin, published, stored.version, stored.newest)
        except UnknownVersionError as error:
            raise DamagedError(str(error)) from error

    def _commit(self, row: StoredCommit, made: dict[int, Commit], stored: StoredHistory) -> Commit:
        known = self._commits.get((row.owner, row.version))
        if known is not None:
            return known
        parent = None
        transcript, conversation = Transcript(), Conversation()
        if row.parent is not None:
            parent = made.get(row.parent)
            if parent is None:
                raise DamagedError(f"the commit that version {row.version} continues is missing")
            transcript, conversation = parent.transcript, parent.conversation
        if row.base_len > len(transcript):
            raise DamagedError(f"version {row.version} continues more tokens than there are")
        head = self._heads.setdefault(row.head, stored.heads[row.head])
        conversation = conversation.extended(head, row.messages)
        if conversation.raw != row.raw:
            conversation = replace(conversation, raw=row.raw)
        commit = Commit(
            owner=row.owner,
            version=row.version,
            parent=parent,
            base_len=row.base_len,
            transcript=transcript.cut(row.base_len).extended(row.tokens),
            conversation=conversation,
            pending=row.pending,
            finish_reason=row.finish_reason,
            created_at=row.created_at,
            said=row.said,
        )
        self.remember(commit)
        return commit

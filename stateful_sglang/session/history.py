"""A session's past: frozen commits, and one pointer to the newest of them.

A version names a commit and never another one. So the numbers of a session rise by one with each
commit and are never given out again: after a rollback from version 5 to version 3 the session is at
version 3, and its next commit is version 6. Versions 4 and 5 remain: they can be read, forked and
rolled back to, since a client may have seen them. A fork is another session with numbers of its
own: it has the versions on the way to where it was forked, and counts on from there.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from stateful_sglang.session.conversation import Conversation
from stateful_sglang.session.messages import Head, Message
from stateful_sglang.session.transcript import Transcript


class UnknownVersionError(LookupError):
    """The history has no such commit."""

    def __init__(self, version: int, at: int) -> None:
        super().__init__(
            f"this history has no version {version}: it is at version {at}; "
            "take one of the versions that its commits list"
        )
        self.version = version


@dataclass(frozen=True, eq=False, slots=True)
class Commit:
    """What a session was after one committed turn. Version 0 is the session as it was opened."""

    version: int
    parent: Commit | None = field(repr=False)
    """The version it continues; None for version 0."""
    base_len: int
    """Tokens of the parent that it continues: all of them unless the turn rewound."""
    transcript: Transcript = field(repr=False)
    """All tokens up to here. They share storage with the parent's."""
    conversation: Conversation = field(repr=False)
    """Head and messages up to here, without `pending`."""
    pending: tuple[Message, ...] = ()
    """Messages that the transcript doesn't hold yet: those given at opening, until the first
    turn renders them."""
    finish_reason: str | None = None
    created_at: float = field(default_factory=time.time)
    """Seconds since the epoch."""

    @property
    def tokens(self) -> array[int]:
        """The tokens this commit added from `base_len` on, typecode ``'i'``, as a copy."""
        return self.transcript.slice(self.base_len)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The messages this commit added."""
        before = len(self.parent.conversation.messages) if self.parent is not None else 0
        return tuple(self.conversation.messages.slice(before))


class History:
    """The commits of one session. Only its tip moves: by `publish` forwards, by `rollback` back.

    Committing has two steps, so that something may happen between them: `prepare` makes the commit,
    `publish` makes it the session's. A commit that is never published leaves no trace, and its
    version goes to the next one: no client has seen it.
    """

    __slots__ = ("_newest", "_origin", "_published", "_tip")

    def __init__(self, origin: Commit) -> None:
        """A history at `origin`, whose next commit is the version after it."""
        self._origin = self._tip = origin
        self._newest = origin.version
        self._published: dict[int, Commit] = {}

    @classmethod
    def opened(cls, head: Head, messages: Iterable[Message] = ()) -> History:
        """The history of a session that was just opened: version 0, no tokens."""
        origin = Commit(0, None, 0, Transcript(), Conversation(head), tuple(messages))
        return cls(origin)

    @property
    def tip(self) -> Commit:
        """The commit that the next turn continues."""
        return self._tip

    @property
    def commits(self) -> list[Commit]:
        """From version 0 to the tip, oldest first, in time proportional to how many they are."""
        commits = []
        commit: Commit | None = self._tip
        while commit is not None:
            commits.append(commit)
            commit = commit.parent
        return commits[::-1]

    def at(self, version: int) -> Commit:
        """The commit that a version names, on the way to the tip or left behind by a rollback.

        O(1) for the commits of this history; those from before a fork are a step each away.

        Raises:
            UnknownVersionError: There is none.
        """
        commit = self._published.get(version, self._origin)
        while commit.version > version and commit.parent is not None:
            commit = commit.parent
        if commit.version != version:
            raise UnknownVersionError(version, self._tip.version)
        return commit

    def messages(self, version: int) -> list[Message]:
        """All messages of a version, rendered or still pending, oldest first."""
        commit = self.at(version)
        return [*commit.conversation.messages, *commit.pending]

    def prepare(
        self,
        *,
        base_len: int,
        tokens: Iterable[int],
        head: Head,
        messages: Sequence[Message] | None,
        finish_reason: str | None = None,
    ) -> Commit:
        """The commit that continues the tip, in time proportional to what is new.

        Args:
            base_len: Tokens of the tip that are kept.
            tokens: New tokens, behind those.
            head: The session's head from now on.
            messages: New messages, the tip's pending ones included; None where text or tokens
                were appended, which no messages stand for.
            finish_reason: How the turn ended; None where nothing was generated.

        Raises:
            ValueError: `base_len` lies beyond the tip's end.
        """
        tip = self._tip
        return Commit(
            version=self._newest + 1,
            parent=tip,
            base_len=base_len,
            transcript=tip.transcript.cut(base_len).extended(tokens),
            conversation=tip.conversation.extended(head, messages),
            pending=tip.pending if messages is None else (),
            finish_reason=finish_reason,
        )

    def publish(self, commit: Commit) -> None:
        """Make a prepared commit the tip.

        Raises:
            ValueError: It doesn't continue the tip, or its version was given out meanwhile.
        """
        if commit.parent is not self._tip or commit.version != self._newest + 1:
            raise ValueError(
                f"a commit of version {commit.version} was prepared for another tip than version "
                f"{self._tip.version}; prepare it again"
            )
        self._published[commit.version] = self._tip = commit
        self._newest = commit.version

    def rollback(self, version: int) -> Commit:
        """Move the tip to another version of this history; nothing is copied.

        Raises:
            UnknownVersionError: There is no such version.
        """
        self._tip = self.at(version)
        return self._tip

    def fork(self, version: int) -> History:
        """A history of its own at a version of this one; nothing is copied.

        Raises:
            UnknownVersionError: There is no such version.
        """
        return History(self.at(version))

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


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Commit:
    """What a session was after one committed turn. Version 0 is the session as it was opened."""

    owner: str = field(repr=False)
    """The session that made it. Forks of that one continue it, and it stays that one's."""
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
    """Messages that the transcript doesn't hold yet: those given at opening or ingested since,
    until the next turn renders them."""
    finish_reason: str | None = None
    created_at: float = field(default_factory=time.time)
    """Seconds since the epoch."""
    said: bytes | None = None
    """Digest of all that was said up to here, for clients that say it again; None where it was not
    such a client that came here."""

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

    __slots__ = ("_newest", "_origin", "_owner", "_published", "_tip", "_weight")

    def __init__(self, owner: str, origin: Commit) -> None:
        """The history of session `owner` at `origin`, whose next commit is the version after it."""
        self._owner = owner
        self._origin = self._tip = origin
        self._newest = origin.version
        self._published: dict[int, Commit] = {}
        self._weight = len(origin.transcript) + _text_tokens(origin)

    @classmethod
    def opened(cls, owner: str, head: Head, messages: Iterable[Message] = ()) -> History:
        """The history of a session that was just opened: version 0, no tokens."""
        origin = Commit(owner, 0, None, 0, Transcript(), Conversation(head), tuple(messages))
        return cls(owner, origin)

    @classmethod
    def restored(
        cls, owner: str, origin: Commit, published: Iterable[Commit], tip: int, newest: int
    ) -> History:
        """A history as it was recorded.

        Args:
            owner: The session whose history it is.
            origin: Where it begins: version 0, or the commit of another session it was forked from.
            published: The commits that `owner` made, each on one of these or on the way to origin.
            tip: The version it is at.
            newest: The newest version that was given out.

        Raises:
            UnknownVersionError: There is no version `tip`.
        """
        history = cls(owner, origin)
        history._published = {commit.version: commit for commit in published}
        history._newest = newest
        history._weight += sum(map(_added, history._published.values()))
        history._tip = history.at(tip)
        return history

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

    @property
    def origin(self) -> Commit:
        """Where it begins: version 0, or the commit of another session that it was forked from."""
        return self._origin

    @property
    def weight(self) -> int:
        """What it holds in memory, as a number of tokens: those of all its versions, left by a
        rollback or not, and what is pending in them. What a fork shares counts in both."""
        return self._weight

    @property
    def newest(self) -> int:
        """The newest version that was given out, on the way to the tip or not."""
        return self._newest

    @property
    def published(self) -> list[Commit]:
        """All commits that this session made, in the order of their versions."""
        return list(self._published.values())

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
        pending: Sequence[Message] = (),
        finish_reason: str | None = None,
        parent: Commit | None = None,
        said: bytes | None = None,
    ) -> Commit:
        """The commit that continues the tip, or another of its commits; O(what is new).

        Args:
            base_len: Tokens of the parent that are kept.
            tokens: New tokens, behind those.
            head: The session's head from now on.
            messages: New messages that the tokens stand for, the parent's pending ones included;
                None where text or tokens were appended, which no messages stand for.
            pending: Messages that stay pending after this commit.
            finish_reason: How the turn ended; None where nothing was generated.
            parent: A commit of this history; None is the tip.
            said: The digest by which it is found again.

        Raises:
            ValueError: `base_len` lies beyond the parent's end.
        """
        parent = parent or self._tip
        return Commit(
            owner=self._owner,
            version=self._newest + 1,
            parent=parent,
            base_len=base_len,
            transcript=parent.transcript.cut(base_len).extended(tokens),
            conversation=parent.conversation.extended(head, messages),
            pending=tuple(pending),
            finish_reason=finish_reason,
            said=said,
        )

    def publish(self, commit: Commit) -> None:
        """Make a prepared commit the tip.

        Raises:
            ValueError: It doesn't continue this history, or its version was given out meanwhile.
        """
        parent = commit.parent
        if (
            parent is None
            or commit.version != self._newest + 1
            or self.at(parent.version) is not parent
        ):
            raise ValueError(
                f"a commit of version {commit.version} was prepared for another history than this "
                f"one at version {self._tip.version}; prepare it again"
            )
        self._published[commit.version] = self._tip = commit
        self._newest = commit.version
        self._weight += _added(commit)

    def rollback(self, version: int) -> Commit:
        """Move the tip to another version of this history; nothing is copied.

        Raises:
            UnknownVersionError: There is no such version.
        """
        self._tip = self.at(version)
        return self._tip

    def fork(self, owner: str, version: int) -> History:
        """The history of another session, `owner`, at a version of this one; nothing is copied.

        Raises:
            UnknownVersionError: There is no such version.
        """
        return History(owner, self.at(version))


_CHARACTERS_A_TOKEN = 4


def _text_tokens(commit: Commit) -> int:
    """Text that became pending in a commit, as tokens; those of messages already make it up."""
    before = set() if commit.parent is None else set(map(id, commit.parent.pending))
    new = (len(message.content) for message in commit.pending if id(message) not in before)
    return sum(new) // _CHARACTERS_A_TOKEN


def _added(commit: Commit) -> int:
    return len(commit.transcript) - commit.base_len + _text_tokens(commit)

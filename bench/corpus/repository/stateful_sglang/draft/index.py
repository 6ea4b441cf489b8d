"""Lookup of what a transcript said before, after the same words as now.

`SuffixIndex` is a suffix automaton (Blumer et al. 1985) over one transcript. Its suffix link from
the state of the whole transcript *is* the longest suffix that occurred before, of whatever length,
so a lookup costs nothing beyond the extension. Each state also knows where it ended most recently.
Extension is amortised O(1) a token in the automaton, plus the length of the suffix-link path
(`RECENCY_DEPTH` at most) for the recent ends; truncation undoes extensions in reverse order, at
their own cost.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import NamedTuple

RECENCY_DEPTH = 64
"""Longest path of suffix links whose recent ends are updated for one token. Text stays far below;
in degenerate repetition a shallow state may then report an older end, never a wrong one."""

_ROOT = 0
_NONE = -1


class Match(NamedTuple):
    """The longest suffix of a transcript that also occurs earlier in it."""

    length: int
    """Tokens matched; 0 when even the last token is new."""
    source: int
    """Position after the most recent earlier occurrence: the continuation starts there."""


class SuffixIndex:
    """Longest-suffix lookup over an append-only token sequence with rollback.

    Tokens are non-negative and below 2**31. Not thread-safe; one owner.
    """

    __slots__ = (
        "_clone_of",
        "_len",
        "_link",
        "_more",
        "_next",
        "_old_ends",
        "_recent",
        "_source",
        "_state_at",
        "_token",
        "_tokens",
    )

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens = array("i")
        # The state of each prefix: _state_at[n] after n tokens.
        self._state_at = array("i", [_ROOT])
        # One entry a state. Most states have one successor, so the first lies in two flat arrays
        # (_token, _next) and only branching states own a dict in _more.
        self._len = array("i", [0])
        self._link = array("i", [_NONE])
        self._token = array("i", [_NONE])
        self._next = array("i", [_NONE])
        self._recent = array("i", [0])
        self._clone_of = array("i", [_NONE])
        self._more: dict[int, dict[int, int]] = {}
        # What _recent held before each extension overwrote it, in the order of the link path.
        self._old_ends = array("i")
        self._source = 0
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes (arrays exactly, dictionaries roughly)."""
        states = (self._len, self._link, self._token, self._next, self._recent, self._clone_of)
        flat = (self._tokens, self._state_at, self._old_ends, *states)
        arrays = sum(len(a) * a.itemsize for a in flat)
        # Apart from the root's, the dict of a branching state rarely outgrows the smallest table,
        # and walking all of them would make reading this figure O(n).
        root = sys.getsizeof(self._more.get(_ROOT))
        return arrays + sys.getsizeof(self._more) + root + 296 * len(self._more)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens."""
        text, state_at, clone_of = self._tokens, self._state_at, self._clone_of
        length, link, recent, old_ends = self._len, self._link, self._recent, self._old_ends
        first, follow, more = self._token, self._next, self._more
        last = state_at[-1]
        for c in tokens:
            end = len(text) + 1
            text.append(c)
            cur = len(length)
            length.append(end)
            link.append(_ROOT)
            first.append(_NONE)
            follow.append(_NONE)
            recent.append(end)
            clone_of.append(_NONE)

            p = last
            q = _NONE
            while p != _NONE:
                t = first[p]
                if t == c:
                    q = follow[p]
                    break
                if t == _NONE:
                    first[p] = c
                    follow[p] = cur
                else:
                    branches = more.get(p)
                    if branches is None:
                        more[p] = {c: cur}
                    elif c in branches:
                        q = branches[c]
                        break
                    else:
                        branches[c] = cur
                p = link[p]

            if q == _NONE:
                self._source = 0
            else:
                if length[p] + 1 != length[q]:
                    q = self._split(p, q, c)
                link[cur] = q
                self._source = recent[q]
                depth = RECENCY_DEPTH
                while q != _ROOT and depth:
                    old_ends.append(recent[q])
                    recent[q] = end
                    q = link[q]
                    depth -= 1
            last = cur
            state_at.append(cur)

    def _split(self, p: int, q: int, c: int) -> int:
        """Give the strings of `q` that end at `p` + `c` a state of their own; returns it."""
        clone = len(self._len)
        self._len.append(self._len[p] + 1)
        self._link.append(self._link[q])
        self._token.append(self._token[q])
        self._next.append(self._next[q])
        self._recent.append(self._recent[q])
        self._clone_of.append(q)
        if q in self._more:
            self._more[clone] = self._more[q].copy()
        self._redirect(p, c, q, clone)
        self._link[q] = clone
        return clone

    def _redirect(self, p: int, c: int, old: int, new: int) -> None:
        """Point the transitions by `c` from `p` and its suffixes that lead to `old` at `new`."""
        while p != _NONE:
            if self._token[p] == c:
                if self._next[p] != old:
                    return
                self._next[p] = new
            else:
                branches = self._more.get(p)
                if branches is None or branches.get(c) != old:
                    return
                branches[c] = new
            p = self._link[p]

    def truncate(self, length: int) -> None:
        """Drop every token from `length` on; a no-op when the transcript is not longer.

        Raises ValueError for a negative length.
        """
        if length < 0:
            raise ValueError(f"cannot truncate an index to {length} tokens: expected 0 or more")
        if length >= len(self._tokens):
            return
        while len(self._tokens) > length:
            self._undo()
        # The first end that the last remaining extension replaced is that of its match.
        self._source = 0
        depth = len(self._matched_path())
        if depth:
            self._source = self._old_ends[-depth]

    def _matched_path(self) -> list[int]:
        """States whose recent end the latest extension replaced."""
        path: list[int] = []
        s = self._link[self._state_at[-1]]
        while s > _ROOT and len(path) < RECENCY_DEPTH:
            path.append(s)
            s = self._link[s]
        return path

    def _undo(self) -> None:
        """Take the last extension back, exactly."""
        path = self._matched_path()
        for s in reversed(path):
            self._recent[s] = self._old_ends.pop()
        c = self._tokens.pop()
        cur = self._state_at.pop()
        clone = len(self._len) - 1
        origin = self._clone_of[clone]
        if origin != _NONE:
            self._link[origin] = self._link[clone]
        p = self._state_at[-1]
        while p != _NONE and self._forget(p, c, cur):
            p = self._link[p]
        if origin != _NONE:
            self._redirect(p, c, clone, origin)
            self._pop_state()
        self._pop_state()

    def _forget(self, p: int, c: int, target: int) -> bool:
        """Remove the transition of `p` by `c` if it leads to `target`; tells whether it did."""
        if self._token[p] == c:
            if self._next[p] != target:
                return False
            self._token[p] = self._next[p] = _NONE
            return True
        branches = self._more.get(p)
        if branches is None or branches.get(c) != target:
            return False
        del branches[c]
        if not branches:
            del self._more[p]
        return True

    def _pop_state(self) -> None:
        state = len(self._len) - 1
        self._more.pop(state, None)
        for column in (self._len, self._link, self._token, self._next, self._recent):
            column.pop()
        self._clone_of.pop()

    def match(self) -> Match:
        """The longest suffix that occurs earlier, and where it did most recently. O(1)."""
        link = self._link[self._state_at[-1]]
        if link <= _ROOT:
            return Match(0, 0)
        return Match(self._len[link], self._source)

    def draft(self, max_tokens: int) -> list[int]:
        """What followed the most recent longest match: `max_tokens` tokens, or none.

        A continuation that reaches the end of the transcript goes on with itself, so a repeated
        passage is drafted in full however short its period.
        """
        length, source = self.match()
        if not length or max_tokens <= 0:
            return []
        found = self._tokens[source : source + max_tokens].tolist()
        period = len(found)
        while len(found) < max_tokens:
            found.append(found[-period])
        return found

    def tokens(self, start: int = 0, stop: int | None = None) -> array[int]:
        """A copy of the indexed tokens from `start` to `stop`."""
        return self._tokens[start:stop]

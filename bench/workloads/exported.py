"""Sessions as files that a server takes in: long ones of real text, made without computing them."""

from __future__ import annotations

import base64
import json
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import corpus

_ANSWER_PART = 4
"""One part in so many of a turn is the user's, the rest the answer."""


class Pieces:
    """Text of the corpus in turns, with its tokens."""

    def __init__(self, tokenizer: Path, tokens_a_turn: int) -> None:
        """
        Args:
            tokenizer: The ``tokenizer.json`` of the server's model.
            tokens_a_turn: Of each turn.
        """
        from tokenizers import Tokenizer

        encoded = Tokenizer.from_file(str(tokenizer)).encode(corpus.code())
        self._text, self._ids, self._offsets = corpus.code(), encoded.ids, encoded.offsets
        self._size = tokens_a_turn

    def turn(self, number: int) -> tuple[Sequence[int], str, str]:
        """Tokens of a turn, what the user says and what is answered."""
        start = (number * self._size) % (len(self._ids) - self._size)
        end, parting = start + self._size, start + self._size // _ANSWER_PART
        begin, middle, stop = (
            self._offsets[start][0],
            self._offsets[parting][0],
            self._offsets[end - 1][1],
        )
        return self._ids[start:end], self._text[begin:middle], self._text[middle:stop]


def session(
    empty: Mapping[str, Any], pieces: Pieces, first: int, turns: int, metadata: Mapping[str, str]
) -> bytes:
    """The body of a request to import a session of some turns, the pieces from `first` on.

    Args:
        empty: A session just opened, as the server exports it.
        pieces: What is said.
        first: Of the pieces.
        turns: How many.
        metadata: Of the session.
    """
    commits = [dict(empty["commits"][0])]
    held = 0
    for number in range(turns):
        ids, said, answer = pieces.turn(first + number)
        commits.append(
            {
                "version": number + 1,
                "parent": number,
                "base_len": held,
                "tokens": base64.b64encode(array("i", ids).tobytes()).decode(),
                "messages": [
                    {"role": "user", "content": said},
                    {"role": "assistant", "raw": answer},
                ],
                "pending": [],
                "raw": False,
                "finish_reason": "stop",
                "created_at": empty["created_at"],
            }
        )
        held += len(ids)
    exported = {
        **empty,
        "options": {**empty["options"], "metadata": dict(metadata)},
        "version": turns,
        "newest": turns,
        "commits": commits,
    }
    return json.dumps({"session": exported}).encode()

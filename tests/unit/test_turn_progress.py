"""Reports of a turn's progress cost what is new in them, and end with the whole output."""

from __future__ import annotations

from array import array
from typing import Any

from stateful_sglang.cpu.platform import prepare

prepare()

from stateful_sglang.runtime.sessions.engine import _progress  # noqa: E402 - SGLang comes after prepare()


class CountedList(list[int]):
    """SGLang's growing output, counting the tokens that are read from it."""

    read = 0

    def __getitem__(self, key: Any) -> Any:
        got = super().__getitem__(key)
        self.read += len(got) if isinstance(key, slice) else 1
        return got

    def __iter__(self) -> Any:
        for token in super().__iter__():
            self.read += 1
            yield token


def test_reading_a_stream_of_reports_reads_each_token_once() -> None:
    output, ids, progress = CountedList(), array("q"), None
    for token in range(2000):
        output.append(token)
        out = {"text": "x", "output_ids": output, "meta_info": {"prompt_tokens": 3}}
        progress = _progress(out, progress, ids)
        assert progress.output_ids[-1] == token
    assert output.read == 2000
    assert progress is not None
    assert progress.output_ids.tolist() == list(range(2000))


def test_an_error_after_tokens_keeps_them() -> None:
    ids = array("q")
    meta = {"prompt_tokens": 3}
    first = _progress({"text": "ab", "output_ids": [1, 2], "meta_info": meta}, None, ids)
    last = _progress({"error": {"message": "no", "code": 503}}, first, ids)
    assert last.finish == {"type": "abort", "message": "no", "status_code": 503}
    assert (last.text, last.output_ids.tolist()) == ("ab", [1, 2])

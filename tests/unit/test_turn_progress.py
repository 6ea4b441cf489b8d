"""Reports of a turn's progress cost what is new in them, and end with the whole output."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from stateful_sglang.cpu.platform import prepare

prepare()

from stateful_sglang.runtime.sessions.engine import _progress  # noqa: E402 - SGLang comes after prepare()
from stateful_sglang.service.engine import EngineError  # noqa: E402


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
        progress = _progress(out, ids, constrained=False)
        assert progress.output_ids[-1] == token
    assert output.read == 2000
    assert progress is not None
    assert progress.output_ids.tolist() == list(range(2000))


def test_an_error_as_the_streams_last_message_is_raised_with_its_kind() -> None:
    ids = array("q")
    _progress({"text": "ab", "output_ids": [1, 2], "meta_info": {}}, ids, constrained=False)
    with pytest.raises(EngineError, match=r"^no$") as ended:
        _progress({"error": {"message": "no", "code": 503}}, ids, constrained=False)
    assert ended.value.kind == "overloaded"

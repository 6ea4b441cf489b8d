"""A stop string ends an answer in whatever tokens it comes, one at a time or several at once."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from inspect import unwrap
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from stateful_sglang.cpu.platform import prepare

prepare()

from sglang.srt.managers.schedule_batch import Req  # noqa: E402
from sglang.srt.plugins.hook_registry import HookRegistry  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402

from stateful_sglang.runtime import stops  # noqa: E402

LETTERS = "abcdef"
END = 2


@pytest.fixture(scope="module")
def attached() -> Iterator[None]:
    """SGLang's request with our hooks, applied by its own registry."""
    with pytest.MonkeyPatch.context() as patch:
        for row in stops.ATTACHMENTS:
            name = row.target.rpartition(".")[2]
            patch.setattr(Req, name, getattr(Req, name))
        patch.setattr(HookRegistry, "_hooks", defaultdict(list))
        patch.setattr(HookRegistry, "_patched", set())
        stops.attach()
        HookRegistry.apply_hooks()
        yield


@pytest.fixture(scope="module")
def byte_level(smollm_tokenizer: Any) -> Any:
    smollm_tokenizer.additional_stop_token_ids = None
    return smollm_tokenizer


@pytest.fixture(scope="module")
def byte_fallback() -> Any:
    """A tokenizer as Llama 2's or Gemma's: what has no token is spelled in one token a byte."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS]
    vocabulary = {word: at for at, word in enumerate(words)}
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", bos_token="<s>"
    )
    tokenizer.additional_stop_token_ids = None
    return tokenizer


def make(tokenizer: Any, **sampling: Any) -> Any:
    params = SamplingParams(**{"max_new_tokens": 2000, **sampling})
    params.normalize(tokenizer)
    prompt = array("q", [1, 1, 1])
    req = Req("r", "", prompt, params, eos_token_ids={END}, vocab_size=len(tokenizer))
    req.tokenizer = tokenizer
    return req


def run(req: Any, steps: Sequence[Sequence[int]]) -> tuple[Any, list[int] | None]:
    """What ended a request, and its tokens through the end; each step accepts its tokens."""
    for accepted in steps:
        req.output_ids.extend(accepted)
        req.update_finish_state(len(accepted))
        if req.finished():
            return req.finished_reason.to_json()["matched"], list(req.output_ids_through_stop)
    return None, None


def spelled(tokenizer: Any, text: str) -> list[int]:
    """One token a byte of a byte-level tokenizer; a character without a token, of the other."""
    if "<0x80>" in tokenizer.get_vocab():
        return [token for letter in text for token in tokenizer.encode(letter)]
    letters = bytes_to_unicode()
    ids: list[int] = tokenizer.convert_tokens_to_ids([letters[byte] for byte in text.encode()])
    return ids


def one_by_one(tokens: Sequence[int]) -> list[list[int]]:
    return [[token] for token in tokens]


def test_sglang_alone_does_not_see_a_stop_string_that_comes_letter_by_letter(
    byte_level: Any,
) -> None:
    """Where this fails, SGLang has mended it, and the hook can go."""
    req = make(byte_level, stop=[LETTERS])
    req._stop_match_tail_len = unwrap(Req._stop_match_tail_len).__get__(req)
    assert run(req, one_by_one(spelled(byte_level, f"say {LETTERS}!"))) == (None, None)


@pytest.mark.usefixtures("attached")
@pytest.mark.parametrize("text", [LETTERS, "🛑日é", "NaN happened", "x" * 256, "🛑" * 256])
def test_a_stop_string_is_seen_byte_by_byte(byte_level: Any, text: str) -> None:
    tokens = spelled(byte_level, f"say {text}")
    steps = one_by_one([*tokens, *spelled(byte_level, "!")])
    assert run(make(byte_level, stop=[text]), steps) == (text, tokens)


@pytest.mark.usefixtures("attached")
def test_a_stream_holds_back_what_may_become_a_stop_string(byte_level: Any) -> None:
    req = make(byte_level, stop=[LETTERS])
    held = []
    for token in spelled(byte_level, f"xy{LETTERS[:-1]}x"):
        req.output_ids.append(token)
        held.append(req.check_match_stop_str_prefix())
    assert held == [False, False, True, True, True, True, True, False]


@pytest.mark.usefixtures("attached")
def test_a_stop_expression_is_seen_byte_by_byte(byte_level: Any) -> None:
    tokens = spelled(byte_level, "ab 🛑日é")
    steps = one_by_one([*tokens, *spelled(byte_level, "!")])
    assert run(make(byte_level, stop_regex=["[🛑x]日é"]), steps) == ("[🛑x]日é", tokens)


@pytest.mark.usefixtures("attached")
def test_a_stop_string_behind_other_byte_tokens_is_seen(byte_fallback: Any) -> None:
    tokens = spelled(byte_fallback, "a🚀🛑")
    assert len(tokens) == 9
    steps = one_by_one([*tokens, *spelled(byte_fallback, "b")])
    assert run(make(byte_fallback, stop=["🛑"]), steps) == ("🛑", tokens)


@pytest.mark.usefixtures("attached")
@pytest.mark.parametrize("before", range(8))
def test_several_tokens_accepted_at_once_are_cut_behind_the_stop_string(
    byte_level: Any, before: int
) -> None:
    tokens = spelled(byte_level, f"say {LETTERS}")
    more = spelled(byte_level, " and more, and more")
    req = make(byte_level, stop=[LETTERS])
    steps = [*one_by_one(tokens[:before]), [*tokens[before:], *more]]
    assert run(req, steps) == (LETTERS, tokens)
    assert list(req.output_ids) == [*tokens, *more]


@pytest.mark.usefixtures("attached")
def test_the_stop_string_that_ends_first_among_tokens_accepted_at_once_wins(
    byte_level: Any,
) -> None:
    tokens = spelled(byte_level, "one two")
    for stop in (["two", "one"], ["one", "two"]):
        assert run(make(byte_level, stop=stop), [tokens]) == ("one", tokens[:3])


@pytest.mark.usefixtures("attached")
def test_the_stop_string_that_begins_first_within_a_token_is_named(byte_level: Any) -> None:
    token = byte_level.encode(" information")
    assert len(token) == 1
    for stop in (["mat", "for"], ["for", "mat"]):
        assert run(make(byte_level, stop=stop), [token]) == ("for", token)


@pytest.mark.usefixtures("attached")
def test_an_end_token_comes_before_a_stop_string_behind_it(byte_level: Any) -> None:
    tokens = [*spelled(byte_level, "one"), END, *spelled(byte_level, "two")]
    assert run(make(byte_level, stop=["two"]), [tokens]) == (END, tokens[:4])
    ignoring = make(byte_level, stop=["two"], ignore_eos=True)
    assert run(ignoring, [tokens]) == ("two", tokens)


@pytest.mark.usefixtures("attached")
def test_a_stop_string_behind_the_last_token_allowed_is_none(byte_level: Any) -> None:
    req = make(byte_level, stop=["two"], max_new_tokens=4)
    req.output_ids.extend(spelled(byte_level, "one two"))
    req.update_finish_state(7)
    assert req.finished_reason.to_json() == {"type": "length", "length": 4}
    assert len(req.output_ids_through_stop) == 4


@pytest.mark.usefixtures("attached")
def test_an_expression_that_cannot_be_searched_for_ends_its_request_alone(byte_level: Any) -> None:
    req = make(byte_level, stop_regex=["a"])
    req.sampling_params.stop_regex_strs = ["("]
    req.output_ids.extend(spelled(byte_level, "one"))
    req.update_finish_state(3)
    assert req.finished_reason.to_json()["type"] == "abort"
    assert len(req.output_ids) == 3


PIECES = st.lists(st.sampled_from([*"abc", "ab", "é", "日", "🛑", "🚀"]), min_size=1, max_size=24)


@pytest.mark.usefixtures("attached")
@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@given(pieces=PIECES, stop=st.lists(PIECES, min_size=1, max_size=3), data=st.data())
def test_an_answer_ends_with_the_first_token_that_completes_a_stop_string(
    request: pytest.FixtureRequest,
    name: str,
    pieces: list[str],
    stop: list[list[str]],
    data: st.DataObject,
) -> None:
    tokenizer = request.getfixturevalue(name)
    wanted = ["".join(each[:4]) for each in stop]
    tokens = [
        token
        for piece in pieces
        for token in (
            tokenizer.encode(piece) if data.draw(st.booleans()) else spelled(tokenizer, piece)
        )
    ]
    steps, rest = [], tokens
    while rest:
        size = data.draw(st.integers(1, 6))
        steps.append(rest[:size])
        rest = rest[size:]
    ends = (
        at + 1
        for at in range(len(tokens))
        if any(each in tokenizer.decode(tokens[: at + 1]) for each in wanted)
    )
    end = next(ends, None)
    matched, output = run(make(tokenizer, stop=wanted), steps)
    assert output == (None if end is None else tokens[:end])
    if end is not None:
        text = tokenizer.decode(output)
        assert text.find(matched) == min(text.find(each) for each in wanted if each in text)

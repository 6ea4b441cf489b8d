"""No number that a client can send reaches the scheduler unless it fits there."""

from __future__ import annotations

import math
import subprocess
import sys
from array import array
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stateful_sglang.api.native.schemas import AppendBody
from stateful_sglang.cpu.platform import prepare
from stateful_sglang.session import bounds

prepare()

from sglang.srt.managers.io_struct import (  # noqa: E402 - SGLang imports only after prepare()
    EmbeddingReqInput,
    GenerateReqInput,
)
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402

from stateful_sglang.runtime import admission  # noqa: E402

VOCAB = 1000


def check(**fields: Any) -> None:
    fields = {"text": "x"} | fields if "input_ids" not in fields else fields
    admission.check(GenerateReqInput(**fields), vocab_size=VOCAB, hidden_size=4)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"sampling_params": {"top_k": 2**31}}, r"sampling_params\.top_k: 2147483648 can't be used"),
    ({"sampling_params": {"top_k": 0.5}}, r"sampling_params\.top_k"),
    ({"sampling_params": {"top_k": [1]}}, r"sampling_params\.top_k"),
    ({"sampling_params": {"min_new_tokens": 2**31}}, r"min_new_tokens \(min_tokens\)"),
    ({"sampling_params": {"max_new_tokens": 1e308}}, r"max_new_tokens \(max_tokens\)"),
    ({"sampling_params": {"temperature": math.nan}}, r"sampling_params\.temperature: nan"),
    ({"sampling_params": {"temperature": math.inf}}, r"sampling_params\.temperature: inf"),
    ({"sampling_params": {"temperature": "warm"}}, r"sampling_params\.temperature: 'warm'"),
    ({"sampling_params": {"top_p": 1e-320}}, r"sampling_params\.top_p"),
    ({"sampling_params": {"repetition_penalty": 1e-320}}, r"sampling_params\.repetition_penalty"),
    ({"sampling_params": {"logit_bias": {"5": 1e308}}}, r"sampling_params\.logit_bias\.5: 1e\+308"),
    ({"sampling_params": {"logit_bias": [5]}}, r"sampling_params\.logit_bias: expected an object"),
    ({"sampling_params": {"stop_token_ids": [3, VOCAB]}}, r"stop_token_ids\[1\]: 1000"),
    ({"sampling_params": {"stop_token_ids": 3}}, r"stop_token_ids: expected a list"),
    ({"sampling_params": {"sampling_seed": 2**63}}, r"sampling_seed \(seed\)"),
    ({"sampling_params": {"stream_interval": 0}}, r"sampling_params\.stream_interval"),
    ({"sampling_params": {"n": 2**31}}, r"sampling_params\.n: 2147483648"),
    ({"text": ["x"] * 1000, "sampling_params": {"n": 1000}}, r"1000 answers to each of 1000"),
    ({"sampling_params": [{}, {"top_k": -2}]}, r"sampling_params\.top_k: -2"),
    ({"sampling_params": {"is_normalized": True}}, r"is_normalized: no sampling parameter"),
    ({"sampling_params": {"stop_strs": 5}}, r"stop_strs: no sampling parameter"),
    ({"sampling_params": {"regex": 5}}, r"sampling_params\.regex: expected a string"),
    ({"sampling_params": {"custom_params": {"a": 1e308}}}, r"custom_params\.a"),
    (
        {"input_ids": [1, VOCAB]},
        r"input_ids\[1\]: 1000 can't be used; expected an integer, 0 to 999",
    ),
    ({"input_ids": [[1], [2, -1]]}, r"input_ids\[1\]\[1\]: -1"),
    ({"logprob_start_len": -2}, r"logprob_start_len: -2"),
    ({"logprob_start_len": [0, 2**31]}, r"logprob_start_len\[1\]"),
    ({"top_logprobs_num": VOCAB}, r"top_logprobs_num: 1000"),
    ({"token_ids_logprob": [[2**63]]}, r"token_ids_logprob\[0\]\[0\]"),
    ({"priority": 2**63}, r"priority"),
    ({"bootstrap_room": 2**64}, r"bootstrap_room"),
    ({"logprob_start_len": [0]}, r"logprob_start_len: a list for one prompt"),
    ({"top_logprobs_num": [[1]], "text": ["a"]}, r"top_logprobs_num"),
    ({"text": ["a", "b"], "top_logprobs_num": [1]}, r"top_logprobs_num: 1 values for 2 prompts"),
    ({"text": ["a", "b"], "logprob_start_len": [0, None]}, r"logprob_start_len: null"),
    ({"input_ids": [1], "sampling_params": [{}]}, r"sampling_params: a list for one prompt"),
    ({"token_indices_to_pool": [[1]]}, r"token_indices_to_pool: a list for one prompt"),
    ({"token_indices_to_pool": 0}, r"token_indices_to_pool: 0 is no list"),
    ({"text": None, "input_ids": 0}, r"input_ids: 0 is no list"),
    ({"session_params": {"offset": 0.5}}, r"session_params\.offset"),
    ({"session_params": {"id": ["a"]}}, r"session_params\.id"),
    ({"session_params": {"ids": "a"}}, r"session_params\.ids: no field"),
    ({"positional_embed_overrides": {"positions": [1]}}, r"positional_embed_overrides"),
    ({"positional_embed_overrides": [[1.0]]}, r"positional_embed_overrides"),
    ({"text": None, "input_embeds": [[1.0, 2.0]]}, r"input_embeds: prompt 0 has the shape"),
    ({"text": None, "input_embeds": [[1.0] * 4, [1.0]]}, r"input_embeds: expected rows of 4"),
    ({"text": None, "input_embeds": [[1e308] * 4]}, r"input_embeds: expected numbers"),
]


@pytest.mark.parametrize(("fields", "named"), REFUSED, ids=range(len(REFUSED)))
def test_what_would_end_the_scheduler_is_refused_naming_the_field(
    fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        check(**fields)


def test_what_clients_ordinarily_send_passes() -> None:
    check()
    check(sampling_params={"temperature": 0, "max_new_tokens": 128, "top_k": -1, "top_p": 0.95})
    check(sampling_params={"stop": ["a", "b"], "stop_token_ids": [1, 2], "ignore_eos": True})
    check(sampling_params={"logit_bias": {"5": -100}, "n": 8, "custom_params": {"who": "me"}})
    check(text=["a", "b"], sampling_params=[{"top_k": 1}, {"top_k": 2}], logprob_start_len=[0, -1])
    check(input_ids=[[1, 2], [3]], token_ids_logprob=[[1], [999]], top_logprobs_num=20)
    check(text=None, input_embeds=[[0.5] * 4] * 3)
    check(session_params={"id": "a", "rid": None, "offset": -0, "replace": False})
    embed = EmbeddingReqInput(text=["a", "b"], dimensions=64)
    admission.check(embed, vocab_size=VOCAB, hidden_size=4)


def test_positions_lie_within_the_prompt() -> None:
    good = GenerateReqInput(input_ids=[1, 2, 3], token_indices_to_pool=[0, 2])
    admission._check_positions(None, good, None, [1, 2, 3])
    for wrong in (1, [[1]]):
        flat = GenerateReqInput(input_ids=[1, 2, 3], token_indices_to_pool=wrong)
        with pytest.raises(ValueError, match="expected a list of integers for each prompt"):
            admission._check_positions(None, flat, None, [1, 2, 3])
    bad = GenerateReqInput(input_ids=[1, 2, 3], multi_item_delimiter_indices=[3])
    with pytest.raises(ValueError, match=r"multi_item_delimiter_indices\[0\]: 3"):
        admission._check_positions(None, bad, None, [1, 2, 3])


async def _first(generator: Any) -> Any:
    return await generator.__anext__()


@pytest.mark.anyio
async def test_a_refusal_comes_when_the_answer_is_read_as_sglangs_own_errors_do() -> None:
    manager = type("Manager", (), {})()
    manager.model_config = type("Config", (), {"vocab_size": VOCAB, "hidden_size": 4})()

    async def generate(_manager: Any, obj: Any, _request: Any) -> Any:
        yield obj

    good = GenerateReqInput(text="x")
    assert await _first(admission._checked_request(generate, manager, good)) is good
    bad = admission._checked_request(generate, manager, GenerateReqInput(input_ids=[-1]))
    with pytest.raises(ValueError, match=r"input_ids\[0\]"):
        await _first(bad)


def test_every_number_of_sglangs_requests_and_sampling_parameters_has_a_bound() -> None:
    numeric = {int, float}
    flags = {"is_normalized", "stop_str_max_len", "stop_regex_max_len"}  # never a client's

    def holds_numbers(annotation: Any) -> bool:
        if annotation in numeric:
            return True
        return any(map(holds_numbers, getattr(annotation, "__args__", ())))

    for struct, table in ((SamplingParams, bounds.SAMPLING), (GenerateReqInput, bounds.REQUEST)):
        from typing import get_type_hints

        hints = get_type_hints(struct, localns={"Image": Any})
        names = {name for name, hint in hints.items() if holds_numbers(hint)} - flags
        assert names <= table.keys() | {"input_embeds"}, names - table.keys()


extremes = st.one_of(
    st.sampled_from([0, -1, 2**31, -(2**31), 2**31 - 1, 2**63, -(2**63) - 1, 2**64, 10**400]),
    st.floats(),
    st.integers(),
)


@given(name=st.sampled_from(sorted(bounds.SAMPLING)), value=extremes)
def test_a_number_that_passes_becomes_a_tensor_as_it_is(name: str, value: Any) -> None:
    bound = bounds.SAMPLING[name]
    if bounds.problem_of(name, value, bound, VOCAB) is not None:
        return
    if name == "sampling_seed":
        assert torch.tensor([value], dtype=torch.int64).item() == value
    elif bound.integer:
        assert torch.tensor([value], dtype=torch.int32).item() == value
    else:
        made = torch.zeros(1)
        made[0] = value
        assert made.isfinite().all()
        assert (made.item() == 0) <= (abs(value) < 1e-30)


@given(ids=st.lists(st.integers(-2, VOCAB + 1), max_size=50))
def test_the_quick_look_at_token_ids_agrees_with_a_look_at_each(ids: list[int]) -> None:
    problem = bounds.problem_of("input_ids", ids, bounds.REQUEST["input_ids"], VOCAB)
    wrong = [at for at, each in enumerate(ids) if not 0 <= each < VOCAB]
    assert (problem is None) == (not wrong)
    if problem is not None:
        assert problem.startswith(f"input_ids[{wrong[0]}]: ")
    assert (bounds.problem_of("x", array("q", ids), bounds.VERSION, VOCAB) is None) == (
        not ids or min(ids) >= 0
    )


OUR_REFUSED: list[tuple[str, Any]] = [
    ("top_k", 2**31),
    ("top_k", -2),
    ("max_tokens", 2**31),
    ("max_tokens", 0),
    ("min_tokens", 2**63),
    ("temperature", 1e308),
    ("top_p", 1e-320),
    ("repetition_penalty", 1e-320),
    ("seed", 2**63),
]


@pytest.mark.parametrize(("name", "value"), OUR_REFUSED)
def test_our_own_routes_keep_the_same_bounds(name: str, value: Any) -> None:
    with pytest.raises(ValidationError) as refused:
        AppendBody.model_validate({"text": "x", "sampling": {name: value}})
    assert refused.value.errors()[0]["loc"][:2] == ("sampling", name)


def test_a_temperature_that_float32_rounds_to_zero_is_taken_as_zero() -> None:
    assert AppendBody.model_validate({"text": "x", "sampling": {"temperature": 1e-300}})
    assert SamplingParams(temperature=1e-300).top_k == 1


_ATTACHED = """
from stateful_sglang.cpu.platform import prepare
prepare()
from sglang.srt.entrypoints.openai.serving_tokenize import OpenAIServingDetokenize
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.plugins.hook_registry import HookRegistry
from stateful_sglang.runtime import admission
from stateful_sglang.runtime.sessions.manager import StatefulTokenizerManager

admission.attach()
HookRegistry.apply_hooks()
assert TokenizerManager.generate_request.__wrapped__.__module__ == TokenizerManager.__module__
manager = StatefulTokenizerManager.__new__(StatefulTokenizerManager)
manager.follow = None
TokenizerManager.generate_request = lambda *given: given
assert manager.generate_request("request", "http") == (manager, "request", "http")
assert TokenizerManager._create_tokenized_object.__wrapped__
assert OpenAIServingDetokenize._convert_to_internal_request.__wrapped__
"""


def test_the_check_stands_before_sglangs_manager_and_ours() -> None:
    ran = subprocess.run([sys.executable, "-c", _ATTACHED], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr

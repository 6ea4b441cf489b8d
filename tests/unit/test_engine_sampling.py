"""Our words for sampling become SGLang's parameters, none lost."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from stateful_sglang.runtime.sessions.sampling import sampling_params
from stateful_sglang.service.sampling import Constraint, Sampling

VALUES: dict[str, Any] = {"stop": ("x", "y"), "stop_token_ids": (3, 4), "ignore_eos": False}


@pytest.mark.parametrize("name", [field.name for field in fields(Sampling)])
def test_each_word_becomes_one_parameter_that_sglang_knows(name: str) -> None:
    from stateful_sglang.cpu.platform import prepare

    prepare()
    from sglang.srt.sampling.sampling_params import SamplingParams

    value = VALUES.get(name, 1)
    made = sampling_params(replace(Sampling(), **{name: value}), None)
    assert list(made.values()) == [list(value) if isinstance(value, tuple) else value]
    SamplingParams(**made)


def test_what_is_left_out_is_left_to_sglang() -> None:
    assert sampling_params(Sampling(), None) == {}


@pytest.mark.parametrize("kind", ["json_schema", "regex", "ebnf"])
def test_a_constraint_is_a_parameter_of_its_kind(kind: Any) -> None:
    assert sampling_params(Sampling(top_k=2), Constraint(kind, "x")) == {"top_k": 2, kind: "x"}

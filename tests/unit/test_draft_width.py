"""Widths follow what drafts brought in; a replay shows what that is worth."""

from __future__ import annotations

import json
import random

import pytest

from stateful_sglang.draft.cost import CPU_COST, VerifyCost
from stateful_sglang.draft.drafter import Drafter
from stateful_sglang.draft.sources.base import NO_DRAFT, Draft
from stateful_sglang.draft.sources.suffix import SuffixSource, grade
from stateful_sglang.draft.width import WidthPolicy


def replay(prompt: list[int], output: list[int], max_draft: int = 8) -> tuple[float, float]:
    """Tokens a step, and cost of all steps in plain steps, of decoding `output` after `prompt`."""
    drafter = Drafter(SuffixSource(), max_draft, CPU_COST)
    drafter.follow(prompt)
    done = steps = 0
    cost = 0.0
    while done < len(output):
        drafted = drafter.draft(len(output) - done - 1)
        accepted = 0
        while accepted < len(drafted) and drafted[accepted] == output[done + accepted]:
            accepted += 1
        drafter.follow(output[done : done + accepted + 1])
        done += accepted + 1
        steps += 1
        cost += 1 + (CPU_COST.fixed + CPU_COST.per_token * len(drafted) if drafted else 0)
    return len(output) / steps, cost


def call(name: str, **arguments: object) -> list[int]:
    return list(json.dumps({"name": name, "arguments": arguments}).encode())


def policy(cost: VerifyCost = CPU_COST) -> WidthPolicy:
    return WidthPolicy(SuffixSource.priors, cost)


def after_match(length: int, tokens: int = 8) -> Draft:
    """What is offered after a match of so many tokens."""
    return Draft(tuple(range(5, 5 + tokens)), grade(length))


def test_without_a_draft_nothing_is_verified() -> None:
    assert policy().width(NO_DRAFT, 8) == 0


def test_width_never_passes_the_room_or_the_draft() -> None:
    free = policy(VerifyCost(0.0, 0.0))
    assert free.width(after_match(20), 100) == 8
    assert free.width(after_match(20), 3) == 3
    assert free.width(after_match(20), 0) == 0
    assert free.width(after_match(20, tokens=2), 8) == 2


def test_longer_matches_draft_more() -> None:
    widths = [policy().width(after_match(length, 32), 32) for length in (1, 2, 4, 8, 16)]
    assert widths == sorted(widths)
    assert widths[-1] > widths[0]


def test_rejections_silence_a_grade_and_hits_bring_it_back() -> None:
    learning = policy()
    unsure, sure = after_match(1), after_match(16)
    assert learning.width(unsure, 8) > 0
    for _ in range(12):
        learning.observe(unsure, [9])
    assert learning.width(unsure, 8) == 0
    assert learning.width(sure, 8) == 8
    for _ in range(12):
        learning.observe(unsure, [5, 6])
    assert learning.width(unsure, 8) > 0


def test_negative_maximum_is_refused() -> None:
    with pytest.raises(ValueError, match="max_draft"):
        Drafter(SuffixSource(), -1, CPU_COST)


def test_a_call_seen_in_the_prompt_is_drafted_on_its_first_repetition() -> None:
    prompt = list(b"tools: ") + call("read_file", path="src/main.py", start=1) + list(b"\nuser: go")
    tokens_a_step, _ = replay(prompt, call("read_file", path="src/util.py", start=40))
    assert tokens_a_step > 3


def test_later_calls_draft_from_earlier_output_of_the_same_transcript() -> None:
    rng = random.Random(3)
    calls = [call("search", query=f"needle{rng.randrange(9999)}", limit=5) for _ in range(6)]
    first, _ = replay([], calls[0])
    whole, _ = replay([], [t for c in calls for t in c])
    assert whole > 2 * first


def test_random_text_costs_hardly_more_than_plain_decoding() -> None:
    rng = random.Random(1)
    text = [rng.randrange(60) for _ in range(3000)]
    _, cost = replay(text[:1000], text[1000:])
    assert cost < 1.02 * 2000

"""The demo's figures are what its turns say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.__main__ import main
from bench.engines.dialogues import Reply
from bench.harness.demo_report import DemoTurn, figures
from bench.suites import demo

FIRST = DemoTurn("A", 1, 0, 1000, 1000, 40, 300.0, 600.0, 4.0, 99, "call")
SECOND = DemoTurn("A", 2, 1040, 200, 201, 40, 50.0, 200.0, 4.0, 99, "call")
OURS = [FIRST, SECOND, replace(FIRST, agent="B", computed_tokens=20, total_ms=100.0)]


def scaled(turns: list[DemoTurn], factor: float) -> list[DemoTurn]:
    return [replace(turn, total_ms=turn.total_ms * factor) for turn in turns]


def test_ratios_are_taken_turn_by_turn() -> None:
    theirs = [replace(turn, total_ms=ms) for turn, ms in zip(OURS, (600, 600, 400), strict=True)]
    numbers = figures([OURS], [theirs])
    assert numbers["turn_ratio_median"] == 3.0
    assert numbers["first_call_ratio"] == 2.5
    assert (numbers["turn_ms_stateful"], numbers["turn_ms_stateless"]) == (200.0, 600.0)
    assert all(isinstance(value, int | float) for value in numbers.values())


def test_rounds_are_merged_by_their_median() -> None:
    numbers = figures([OURS, scaled(OURS, 3)], [scaled(OURS, 4), scaled(OURS, 4)])
    assert numbers["turn_ratio_median"] == 2.0
    assert numbers["rounds"] == 2


def test_only_later_turns_count_for_what_was_computed_beyond_the_delta() -> None:
    worse = [FIRST, replace(SECOND, computed_tokens=260), OURS[2]]
    assert figures([OURS], [OURS])["computed_over_delta_max"] == 1
    assert figures([OURS, worse], [OURS, OURS])["computed_over_delta_max"] == 60
    assert "computed_over_delta_max" not in figures([[FIRST]], [[FIRST]])


def test_other_answers_and_other_prompts_are_counted() -> None:
    theirs = [FIRST, replace(SECOND, text="other", delta_tokens=190), OURS[2]]
    numbers = figures([OURS], [theirs])
    assert (numbers["answers_differing"], numbers["prompts_differing"]) == (1, 1)


def test_what_a_call_brought_back_is_said_in_the_next_turn() -> None:
    class Parrot:
        def say(self, messages, answer):
            call = '{"name": "count_lines", "arguments": {"path": "nowhere"}}'
            return Reply(0, 10, 10, 5, 1.0, 2.0, None, 99, call)

    recording = demo.Recording()
    for number in (1, 2):
        demo.take_turn(Parrot(), "A", number, 2, recording)
    first, second = recording.messages["A", 1], recording.messages["A", 2]
    assert [message["role"] for message in first] == ["user"]
    assert [message["role"] for message in second] == ["tool", "user"]
    assert second[0]["content"] == "error: nowhere does not exist"
    assert recording.failed_calls == 1


@pytest.mark.parametrize("turns", ["0", "-1", "17", "x"])
def test_turns_that_cannot_be_run_are_a_usage_error(turns: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--turns", turns])
    assert ended.value.code == 2

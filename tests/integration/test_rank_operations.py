"""Forks, rollbacks, prefills, ephemeral turns and salts on real ranks, below the HTTP routes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ARM = Path(__file__).with_name("rank_operations_arm.py")
PAGE = 1
"""Tokens that a turn may compute beyond its delta: the last sampled token's KV is not kept."""

pytestmark = pytest.mark.server


@pytest.fixture(scope="module", params=["auto", "off"], ids=["drafting", "plain"])
def seen(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the arm saw, with drafts and without; in float32 equal prompts give equal answers."""
    command = [sys.executable, str(ARM), "--dtype", "float32", "--context-length", "4096"]
    # A prompt of several chunks: what a chunk leaves in the tree is not a turn's end.
    command += ["--chunked-prefill-size", "64", "--draft", request.param]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("SEEN ")]
    assert lines, ran.stdout[-4000:] + ran.stderr[-4000:]
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("SEEN "))
    return found


def test_an_ephemeral_turn_finds_its_sessions_kv_and_keeps_nothing(seen: dict[str, Any]) -> None:
    assert seen["ephemeral"] == {"kept": 0, "cached": True, "generated": 8}


def test_ephemeral_turns_run_beside_a_writer_and_change_no_token_of_it(
    seen: dict[str, Any],
) -> None:
    assert seen["beside"] == [24, 8, 8]
    assert seen["same_as_alone"]


def test_a_prefill_generates_nothing_and_leaves_kv_up_to_its_end(seen: dict[str, Any]) -> None:
    prefill = seen["prefill"]
    assert (prefill["finish"], prefill["output"], prefill["text"]) == ("length", [], "")
    assert prefill["covered"] == 0
    assert prefill["pinned"]
    assert prefill["left_to_compute"] <= 1 + PAGE


def test_a_fork_shares_its_sources_kv(seen: dict[str, Any]) -> None:
    assert seen["fork"]["covered"] == 0
    assert seen["fork"]["left_to_compute"] == 2
    assert seen["unforked"] == "stale_base", "said at the first turn of a fork of nobody"


def test_a_rollback_cuts_the_leaf_and_the_next_turn_goes_on_from_there(
    seen: dict[str, Any],
) -> None:
    assert seen["rollback"] == 0
    assert seen["after_rollback"] <= 1 + PAGE


def test_kv_is_shared_inside_a_salt_only(seen: dict[str, Any]) -> None:
    first, other, again = seen["salts"]
    assert (first, other) == (0, 0)
    assert again == seen["prompt"] - PAGE


def test_closed_sessions_leave_no_leaf(seen: dict[str, Any]) -> None:
    assert seen["sessions_left"] == 0
    assert len(seen["digest"]) == 16

"""Two trees' engines beside each other: pairing, order, figures. No server."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.engines.arms import Setting
from bench.engines.load import NeverTogetherError
from bench.engines.ours import of_tree
from bench.engines.pair import AFTER, BEFORE, Pair
from bench.workloads.cells import decode, prefill

CELLS = [prefill(128), decode(1, 32), decode(4, 32)]


class Side:
    """A server of a machine that gets slower with every request, and the log of both sides."""

    def __init__(self, name: str, factor: float, log: list[tuple[str, str, tuple[int, ...]]]):
        self.name, self.factor, self.log = name, factor, log

    def first_token_s(self, prompt: Sequence[int], slot: int = 0) -> float:
        self.log.append((self.name, "prefill", tuple(prompt)))
        return self.factor * self._drift()

    def decode_rate(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        self.log.append((self.name, f"decode {len(prompts)}", tuple(prompts[0])))
        return len(prompts) / (self.factor * self._drift())

    def _drift(self) -> float:
        return 1 + len(self.log) / 1000


@pytest.fixture
def log() -> list[tuple[str, str, tuple[int, ...]]]:
    return []


def run(log: list[tuple[str, str, tuple[int, ...]]], rounds: int = 4) -> Pair:
    loads = {BEFORE: Side(BEFORE, 1.0, log), AFTER: Side(AFTER, 1.25, log)}
    pair = Pair(loads, CELLS, random.Random(3), 1000)
    pair.warm_up()
    log.append(("", "rounds", ()))
    for number in range(rounds):
        pair.round(number)
    return pair


def test_a_slowdown_is_found_on_a_machine_that_drifts(log) -> None:
    pair = run(log)
    for cell in CELLS:
        found = pair.slowdown(cell)
        assert found.low <= found.ratio <= found.high
        assert found.ratio == pytest.approx(1.25, rel=0.01)
        assert found.count == 4
    figures = pair.figures()
    assert figures["slowdown_prefill-128"] == pair.slowdown(prefill(128)).ratio
    assert figures["slowdown_worst_high"] == max(pair.slowdown(cell).high for cell in CELLS)


def test_both_servers_are_asked_the_same_in_turns_and_each_begins_as_often(log) -> None:
    run(log)
    asked = log[log.index(("", "rounds", ())) + 1 :]
    pairs = list(zip(asked[::2], asked[1::2], strict=True))
    assert all(a[1:] == b[1:] and {a[0], b[0]} == {BEFORE, AFTER} for a, b in pairs)
    first = [a[0] for a, _ in pairs]
    assert first.count(BEFORE) == first.count(AFTER)


def test_prefills_are_new_and_contexts_were_filled_before_anything_is_timed(log) -> None:
    run(log)
    start = log.index(("", "rounds", ()))
    filled = {prompt for _, kind, prompt in log[:start] if kind == "prefill"}
    later = log[start + 1 :]
    assert all(prompt in filled for _, kind, prompt in later if kind.startswith("decode"))
    fresh = [prompt for name, kind, prompt in later if kind == "prefill" and name == BEFORE]
    assert len(set(fresh)) == len(fresh) == 20
    assert not filled & set(fresh)


def test_a_cell_that_one_server_cannot_decode_has_no_figures_and_says_why(log) -> None:
    class Single(Side):
        def decode_rate(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
            if len(prompts) > 1:
                raise NeverTogetherError("one at a time")
            return super().decode_rate(prompts, tokens)

    loads = {BEFORE: Side(BEFORE, 1.0, log), AFTER: Single(AFTER, 1.0, log)}
    pair = Pair(loads, CELLS, random.Random(3), 1000)
    pair.warm_up()
    pair.round(0)
    pair.round(1)
    assert pair.missing == {decode(4, 32): "after: one at a time"}
    assert pair.figures()["slowdown_decode-b4-c32"] is None
    assert pair.figures()["slowdown_worst"] is not None


def test_another_tree_is_run_by_its_own_python_and_sees_no_source_but_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    command = of_tree(tmp_path, Path("/venv/bin/python"))(Setting(Path("/m"), Path("/p"), 2))
    assert command.words[:3] == ("/venv/bin/python", "-m", "stateful_sglang.launch")
    assert (command.env["PYTHONPATH"], command.folder) == (str(tmp_path), tmp_path)


def test_an_unknown_cell_is_a_usage_error_that_names_the_known_ones(capsys) -> None:
    here = str(Path(__file__).parent)
    with pytest.raises(SystemExit) as ended:
        main(["trees", "--before", here, "--before-python", __file__, "--cells", "prefill-7"])
    assert ended.value.code == 2
    assert "prefill-512" in capsys.readouterr().err


def test_a_cell_that_takes_long_is_measured_once_a_round(
    log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.engines.pair.CELL_S", -1.0)
    pair = run(log, rounds=2)
    assert [len(values) for values in pair.seconds[AFTER][prefill(128)].values()] == [1, 1]
    assert pair.slowdown(prefill(128)).count == 2

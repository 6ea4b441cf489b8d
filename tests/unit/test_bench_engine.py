"""The engine bench's arithmetic: limits, statistics, figures and table."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bench.engines.dialects import LlamaCppDialect, OpenAIDialect, SGLangDialect
from bench.harness import report
from bench.harness.limits import ModelCost, Rates, limit_s, model_cost, work
from bench.harness.plot import plot
from bench.harness.results import FORWARD, OURS, VLLM, Results
from bench.harness.stats import Arrival, joint, paired_interval, paired_ratio, summarise
from bench.workloads.cells import HEAVY, Cell, all_cells, decode, plan, prefill, verify

SMOLLM2 = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 49152,
}
TINY = ModelCost(
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=4,
    linear_parameters=100,
    head_parameters=50,
    element_bytes=2.0,
)


def test_the_embedded_model_costs_what_its_files_say() -> None:
    cost = model_cost(SMOLLM2)
    assert cost.kv_bytes == 23_040
    # 134.5 million parameters, of which 61 norms of 576 are in no matrix.
    assert cost.weight_bytes / 2 + 61 * 576 == 134_515_008


def test_a_configuration_without_optional_fields_is_read() -> None:
    config = {k: v for k, v in SMOLLM2.items() if k not in ("head_dim", "num_key_value_heads")}
    cost = model_cost(config)
    assert (cost.kv_heads, cost.head_dim) == (9, 64)
    with pytest.raises(KeyError, match="vocab_size"):
        model_cost({k: v for k, v in SMOLLM2.items() if k != "vocab_size"})


def test_a_decode_step_reads_weights_and_context_and_writes_its_keys() -> None:
    needed = work(TINY, decode(3, 10))
    assert needed.bytes == 2 * 150 + 3 * 11 * (2 * 1 * 4 * 2)
    assert needed.operations == 2 * 150 * 3 + 4 * 2 * 4 * 3 * 11


def test_a_prefill_computes_one_row_of_logits_and_causal_attention() -> None:
    needed = work(TINY, prefill(5))
    assert needed.operations == 2 * 100 * 5 + 2 * 50 + 4 * 2 * 4 * (1 + 2 + 3 + 4 + 5)


@given(st.integers(1, 40), st.integers(0, 200))
def test_verifying_costs_the_pairs_of_as_many_decode_steps(width: int, context: int) -> None:
    together = work(TINY, verify(width, context)).operations
    single = sum(work(TINY, decode(1, context + i)).operations for i in range(width))
    assert together == single


def test_a_limit_is_the_slower_of_reading_and_computing() -> None:
    needed = work(TINY, decode(1, 10))
    reads = Rates(read_bytes_per_s=1.0, bf16_ops_per_s=1e30, f32_ops_per_s=1.0)
    computes = Rates(read_bytes_per_s=1e30, bf16_ops_per_s=0.5, f32_ops_per_s=1.0)
    assert limit_s(TINY, decode(1, 10), reads) == needed.bytes
    assert limit_s(TINY, decode(1, 10), computes) == needed.operations


def test_cells_have_names_of_their_own_and_heavy_ones_come_once() -> None:
    for quick in (False, True):
        cells = all_cells([plan(quick, True), plan(quick, False)])
        assert len({cell.name for cell in cells}) == len(cells)
    later = plan(False, False)
    assert all(batch * context < HEAVY for batch, context in later.decodes)
    assert set(later.cells) < set(plan(False, True).cells)


def test_the_figures_cells_are_in_every_plan() -> None:
    wanted = {decode(1, 128), decode(16, 128), prefill(2048), verify(8, 128), verify(8, 2048)}
    wanted |= {decode(1, 2048)}
    for quick in (False, True):
        for first in (False, True):
            assert wanted <= set(plan(quick, first).cells)


@given(st.lists(st.floats(0.1, 1e6), min_size=1))
def test_a_median_lies_within_its_spread(values: list[float]) -> None:
    summary = summarise(values)
    assert summary.low <= summary.median <= summary.high
    assert summary.count == len(values)


def test_nothing_has_no_summary() -> None:
    with pytest.raises(ValueError, match="no measurements"):
        summarise([])


def test_ratios_are_paired_by_round() -> None:
    # The machine is ten times slower in round 1: unpaired medians would tell nothing.
    ratio = paired_ratio({0: 2.0, 1: 20.0, 2: 7.0}, {0: 1.0, 1: 10.0, 3: 1.0})
    assert ratio is not None
    assert (ratio.median, ratio.count) == (2.0, 2)
    assert paired_ratio({0: 1.0}, {1: 1.0}) is None


@given(
    rate=st.floats(1.0, 200.0),
    offsets=st.lists(st.floats(0.0, 0.5), min_size=1, max_size=16),
    tokens=st.integers(40, 80),
)
def test_streams_of_one_rate_add_up(rate: float, offsets: list[float], tokens: int) -> None:
    slowest = tokens / rate
    streams = [
        [Arrival(slowest * offset + n / rate, n + 1) for n in range(tokens)] for offset in offsets
    ]
    assert joint(streams).tokens_per_s == pytest.approx(rate * len(offsets), rel=1e-6)


def test_tokens_before_all_streams_run_do_not_count() -> None:
    alone = [Arrival(t / 100, t + 1) for t in range(100)]  # 100/s alone for a second,
    together = [Arrival(1 + t / 10, 100 + t) for t in range(1, 11)]  # then 10/s beside another
    late = [Arrival(1 + t / 10, t + 1) for t in range(11)]
    found = joint([alone + together, late])
    assert found == pytest.approx((20, 10, 1, 2), rel=0.02)


def test_streams_that_never_overlap_have_decoded_nothing_together() -> None:
    early = [Arrival(0.0, 1), Arrival(1.0, 9)]
    late = [Arrival(2.0, 1), Arrival(3.0, 9)]
    found = joint([early, late])
    assert (found.tokens_per_s, found.tokens, found.end - found.begin) == (0, 0, 0)


def test_every_dialect_counts_tokens_so_far() -> None:
    sglang, vllm, llama = SGLangDialect(), OpenAIDialect("m"), LlamaCppDialect()
    assert sglang.tokens({"meta_info": {"completion_tokens": 3}}, 2) == 3
    assert vllm.tokens({"usage": {"completion_tokens": 4}}, 2) == 4
    assert vllm.tokens({"usage": None}, 2) == 2
    assert llama.tokens({"tokens": [7], "stop": False}, 2) == 3
    assert llama.tokens({"tokens": [], "stop": True, "tokens_predicted": 5}, 4) == 5


def _results() -> Results:
    cells = [prefill(2048), decode(1, 128), decode(16, 128), decode(1, 2048)]
    cells += [verify(8, 128), verify(8, 2048)]
    results = Results(cells, dict.fromkeys((OURS, VLLM, FORWARD), TINY))
    results.rates.append(Rates(1e3, 1e9, 1e8))
    results.rates.append(Rates(2e3, 5e8, 2e8))
    return results


def _add(results: Results, column: str, cell: Cell, *seconds: float) -> None:
    for number, value in enumerate(seconds):
        results.add(column, cell, number, value)


def test_figures_are_none_where_nothing_was_measured() -> None:
    assert set(_results().figures().values()) == {None}


def test_figures_follow_from_the_cells() -> None:
    results = _results()
    _add(results, OURS, decode(1, 128), 1.0, 10.0)
    _add(results, VLLM, decode(1, 128), 2.0, 20.0)
    _add(results, FORWARD, decode(1, 128), 2.0)
    _add(results, FORWARD, decode(1, 2048), 4.0)
    _add(results, FORWARD, verify(8, 128), 2.5)
    _add(results, FORWARD, verify(8, 2048), 5.5)
    figures = results.figures()
    assert figures["decode_b1_vs_vllm"] == 2.0
    assert figures["verify8_over_decode1"] == 1.375
    # The best of the rounds' rates: 2,000 bytes a second.
    limit = work(TINY, decode(1, 128)).bytes / 2e3
    assert figures["decode_b1_limit_share"] == pytest.approx(limit / 2.0)
    assert figures["prefill2048_vs_vllm"] is None


def test_json_holds_every_cell_with_a_speed_or_a_reason() -> None:
    results = _results()
    _add(results, OURS, decode(16, 128), 0.5)
    results.failed[VLLM] = "it is not installed"
    results.missing[OURS, prefill(2048)] = "it would take long"
    read = json.loads(json.dumps(results.as_json()))
    cells = {cell["name"]: cell["columns"] for cell in read["cells"]}
    assert cells["decode-b16-c128"][OURS]["tokens_per_s"]["median"] == 32.0
    assert cells["decode-b16-c128"][VLLM] == {"missing": "it is not installed"}
    assert cells["prefill-2048"][OURS] == {"missing": "it would take long"}


def test_the_table_shows_speed_spread_share_and_failures() -> None:
    results = _results()
    _add(results, OURS, decode(16, 128), 0.5, 1.0, 0.8)
    results.failed[VLLM] = "it is not installed"
    sink = io.StringIO()
    report.show(results, {OURS: "this", VLLM: "that"}, Console(file=sink, width=160))
    printed = sink.getvalue()
    row = next(line for line in printed.splitlines() if "decode-b16-c128" in line)
    share = results.share(OURS, decode(16, 128))
    assert f"20.0 (16 to 32) {share:4.0%}" in row
    assert "n/a" in row
    assert "vllm FAILED: it is not installed" in printed
    assert "\x1b" not in printed


def test_the_plot_is_written(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    results = _results()
    _add(results, OURS, decode(16, 128), 0.5, 1.0)
    _add(results, FORWARD, verify(8, 128), 0.5)
    plot(results, tmp_path / "engine.png")
    assert (tmp_path / "engine.png").read_bytes().startswith(b"\x89PNG")


def test_an_interval_holds_the_ratio_of_rounds_and_is_wide_with_few() -> None:
    theirs = {number: 2.0**number for number in range(8)}  # The machine slows down all the time.
    noise = (1.01, 0.99, 1.02, 0.98, 1.0, 1.01, 0.99, 1.0)
    ours = {number: 1.1 * noise[number] * value for number, value in theirs.items()}
    found = paired_interval(ours, theirs)
    assert found.ratio == pytest.approx(1.1, rel=0.005)
    assert 1.08 < found.low < 1.1 < found.high < 1.12
    assert found.count == 8
    two = paired_interval({n: ours[n] for n in (2, 3)}, theirs)
    assert two.high - two.low > 5 * (found.high - found.low)


def test_an_interval_of_one_round_is_everything_and_of_none_nothing() -> None:
    assert paired_interval({0: 3.0}, {0: 2.0}) == (1.5, 0.0, float("inf"), 1)
    assert paired_interval({0: 3.0}, {1: 2.0}) is None

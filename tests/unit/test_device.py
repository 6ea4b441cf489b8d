"""CPU settings as a function of cores, memory and model."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stateful_sglang.server import cpu_settings as device
from stateful_sglang.server.cpu_settings import (
    ModelShape,
    NotEnoughMemoryError,
    Wanted,
    choose,
    model_shape,
)
from stateful_sglang.server.machine import Machine

GIB = 1 << 30
SMOLLM2_CONFIG = {
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}
smollm2 = model_shape(SMOLLM2_CONFIG, 269_060_552, "bfloat16")
llama_8b = ModelShape(weight_bytes=16 * GIB, kv_bytes_per_token=131_072, max_context=131_072)


def test_the_default_model_costs_23_kb_a_token() -> None:
    assert smollm2 == ModelShape(269_060_552, 23_040, 8192)


def test_float32_doubles_the_weights_and_the_kv() -> None:
    shape = model_shape(SMOLLM2_CONFIG, 269_060_552, "float32")
    assert (shape.weight_bytes, shape.kv_bytes_per_token) == (2 * 269_060_552, 46_080)


def test_weights_that_are_not_here_yet_are_estimated_from_the_configuration() -> None:
    estimate = model_shape(SMOLLM2_CONFIG, None, "bfloat16").weight_bytes
    assert 0.8 < estimate / 269_060_552 < 1.4


def test_the_text_part_of_a_multimodal_configuration_counts() -> None:
    config = {"text_config": SMOLLM2_CONFIG, "hidden_size": 1}
    assert model_shape(config, 269_060_552, "bfloat16") == smollm2


def test_older_configurations_name_their_fields_otherwise() -> None:
    config = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 10, "n_positions": 64}
    assert model_shape(config, 100, "bfloat16") == ModelShape(100, 64, 64)


def test_a_configuration_without_layers_is_refused_by_name() -> None:
    with pytest.raises(KeyError, match="num_hidden_layers"):
        model_shape({"hidden_size": 8}, None, "bfloat16")


def test_a_roomy_machine_serves_the_whole_context_on_every_core() -> None:
    chosen = choose(Machine(2, 20 * GIB), smollm2, Wanted())
    assert chosen["threads"].value == 2
    assert chosen["context_length"].value == 8192
    assert chosen["max_total_tokens"].value == device.POOL_TOKENS
    assert chosen["dtype"].value == "bfloat16"


def test_little_memory_shrinks_pool_and_context_and_says_so() -> None:
    chosen = choose(Machine(4, 26 * GIB), llama_8b, Wanted())
    pool = chosen["max_total_tokens"].value
    assert pool == 15 * GIB // 4 // 131_072
    assert chosen["context_length"].value == pool
    assert "131072" in chosen["context_length"].reason


def test_too_little_memory_names_what_is_needed_and_what_there_is() -> None:
    with pytest.raises(NotEnoughMemoryError, match=r"16\.0 GiB.*10\.0 GiB are free"):
        choose(Machine(4, 10 * GIB), llama_8b, Wanted())


def test_the_kernels_copy_of_the_weights_counts_and_can_be_done_without() -> None:
    machine = Machine(4, 26 * GIB)
    packed = replace(llama_8b, packed_bytes=llama_8b.weight_bytes)
    choose(machine, llama_8b, Wanted())
    with pytest.raises(NotEnoughMemoryError, match=r"32\.0 GiB.*STATEFUL_SGLANG_CPU_ISA=off"):
        choose(machine, packed, Wanted())


def test_a_context_that_does_not_fit_is_refused_rather_than_cut() -> None:
    with pytest.raises(NotEnoughMemoryError, match="shorter context"):
        choose(Machine(4, 20 * GIB), llama_8b, Wanted(context_length=100_000))


def test_a_long_context_lowers_the_number_of_running_requests() -> None:
    model = ModelShape(GIB, 1024, 1_000_000)
    chosen = choose(Machine(32, 64 * GIB), model, Wanted())
    assert chosen["max_running_requests"].value == device.TABLE_LIMIT // 4_000_000


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 2), (4, 4), (8, 7), (64, 60)])
def test_threads_leave_a_core_to_http_where_there_are_cores_to_spare(cores, threads) -> None:
    assert choose(Machine(cores, 64 * GIB), llama_8b, Wanted())["threads"].value == threads


def test_a_small_model_does_not_take_more_threads_than_it_can_feed() -> None:
    assert choose(Machine(64, 64 * GIB), smollm2, Wanted())["threads"].value == 32


def test_a_sliding_window_asks_for_one_pool() -> None:
    shape = model_shape({**SMOLLM2_CONFIG, "sliding_window": 4096}, None, "bfloat16")
    chosen = choose(Machine(2, 20 * GIB), shape, Wanted())
    assert chosen["disable_hybrid_swa_memory"].value is True
    assert "disable_hybrid_swa_memory" not in choose(Machine(2, 20 * GIB), smollm2, Wanted())


@given(
    cores=st.integers(1, 256),
    gib=st.floats(0.1, 2000),
    weights=st.integers(1 << 20, 1 << 40),
    kv=st.integers(256, 1 << 20),
    context=st.integers(1024, 1 << 20),
    wanted=st.builds(
        Wanted,
        context_length=st.none() | st.integers(1, 1 << 20),
        max_total_tokens=st.none() | st.integers(1024, 1 << 22),
        max_running_requests=st.none() | st.integers(1, 4096),
        threads=st.none() | st.integers(1, 512),
    ),
)
def test_what_is_chosen_always_fits_and_what_was_given_is_kept(
    cores, gib, weights, kv, context, wanted
) -> None:
    machine, model = Machine(cores, int(gib * GIB)), ModelShape(weights, kv, context)
    try:
        chosen = choose(machine, model, wanted)
    except NotEnoughMemoryError:
        return
    pool, length = chosen["max_total_tokens"].value, chosen["context_length"].value
    assert weights + pool * kv <= machine.free_memory
    assert length == wanted.context_length or length <= min(pool, context)
    assert wanted.max_total_tokens in (None, pool)
    assert wanted.context_length in (None, length)
    assert wanted.max_running_requests in (None, chosen["max_running_requests"].value)
    assert chosen["threads"].value == wanted.threads or 1 <= chosen["threads"].value <= max(
        cores, 2
    )
    assert chosen["max_running_requests"].value >= 1


def test_the_report_has_a_line_for_every_setting_and_marks_what_was_given() -> None:
    machine = Machine(2, 20 * GIB)
    chosen = choose(machine, smollm2, Wanted(context_length=4096))
    report = device.describe(chosen, {"context_length": 4096}, machine)
    lines = report.splitlines()
    assert len(lines) == 1 + len(chosen)
    assert any(line.split() == ["--context-length", "4096", "given"] for line in lines)


def test_the_report_warns_when_others_hold_the_cores() -> None:
    machine = Machine(2, 20 * GIB, load=7.2)
    report = device.describe(choose(machine, smollm2, Wanted()), {}, machine)
    assert "7 other processes compete for 2 cores" in report
    assert "OMP_NUM_THREADS=1" in report

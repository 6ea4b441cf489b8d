"""Times of our engine's model forward alone: SGLang's ModelRunner in a process without a server.

Settings are the launcher's, the KV pool holds random numbers, and each step is given to
``ModelRunner.forward`` as the scheduler gives it. Prompts longer than the chunk of the launcher's
settings run in such chunks, one after the other. Sampling is not part of it.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from bench.workloads.cells import Cell, Plan

SECONDS = 1.5
"""Spent on a cell, unless its fewest repeats take longer."""
FEWEST, MOST = 3, 40
"""Repeats of a cell."""
FILLED = 8192
"""Slots of the KV pool that get random numbers of their own; the others repeat them."""


class ForwardError(RuntimeError):
    """The model could not be run; the message is the child's traceback."""


def measure(arguments: list[str], wanted: Plan, threads: int) -> dict[str, list[float]]:
    """Seconds of each forward pass, by the name of the cell.

    Args:
        arguments: Of the launcher.
        wanted: What to measure.
        threads: Compute threads.

    Raises:
        ForwardError: The process that runs the model failed.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    descriptor, log = tempfile.mkstemp(prefix="stateful-sglang-forward-", suffix=".log")
    os.close(descriptor)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        child = context.Process(target=_child, args=(arguments, wanted, log, theirs))
        child.start()
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    theirs.close()
    try:
        result = ours.recv()
    except EOFError as error:
        child.join()
        raise ForwardError(
            f"the process ended with status {child.exitcode}; what it printed is in {log}"
        ) from error
    finally:
        child.join(30)
        if child.is_alive():
            child.kill()
    if isinstance(result, str):
        raise ForwardError(result)
    return result


def _child(arguments: list[str], wanted: Plan, log: str, results: Connection) -> None:
    try:
        _print_into(log)
        steps = Steps(arguments)
        results.send({cell.name: steps.repeat(cell) for cell in wanted.cells})
    except BaseException:
        results.send(traceback.format_exc())


def _print_into(log: str) -> None:
    """Keep SGLang's messages, and those of its libraries, out of the bench's output."""
    with open(log, "wb") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)


class Steps:
    """The model with a full KV pool, and the batches that make it step."""

    def __init__(self, arguments: list[str]) -> None:
        from stateful_sglang import launch
        from stateful_sglang.server.parser import parse

        server_args, _ = launch.configure(*parse(arguments))
        import torch
        from sglang.benchmark.one_batch import load_model
        from sglang.srt.runtime_context import (
            SpawnRanks,
            get_schedule,
            publish,
            spawn_world_rank,
        )
        from sglang.srt.server_args import PortArgs

        rank = spawn_world_rank(server_args, tp_rank=0, pp_rank=0)
        publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=rank, gpu_id=0))
        loaded, _ = load_model(server_args, PortArgs.init_new(server_args), 0, 0)
        self._torch = torch
        self._runner = loaded.torch_runner
        self._chunk = get_schedule().chunked_prefill_size
        self._table = self._runner.req_to_token_pool.req_to_token
        self._vocabulary = self._runner.model_config.vocab_size
        self._fill()

    @property
    def model(self) -> Any:
        """The loaded causal LM."""
        return self._runner.model

    def repeat(self, cell: Cell) -> list[float]:
        """Seconds of some repeats, after one that warms up."""
        self._lay_out(cell)
        self._once(cell)
        times: list[float] = []
        end = time.perf_counter() + SECONDS
        while len(times) < FEWEST or (time.perf_counter() < end and len(times) < MOST):
            times.append(self._once(cell))
        return times

    def _fill(self) -> None:
        torch, pool = self._torch, self._runner.token_to_kv_pool
        noise = None
        for buffer in (*pool.k_buffer, *pool.v_buffer):
            if noise is None:
                noise = torch.randn(FILLED, *buffer.shape[1:]).to(buffer.dtype)
            for first in range(0, len(buffer), FILLED):
                part = buffer[first : first + FILLED]
                part.copy_(noise[: len(part)])

    def _lay_out(self, cell: Cell) -> None:
        """Give each request of a cell a run of slots; slot and row 0 are SGLang's padding."""
        length = cell.context + cell.width
        needed, slots = cell.batch * length, self._runner.max_total_num_tokens
        if needed > slots:
            raise ValueError(f"{cell.name} needs {needed} KV slots; the pool has {slots}")
        runs = self._torch.arange(1, needed + 1, dtype=self._table.dtype)
        self._table[1 : cell.batch + 1, :length] = runs.view(cell.batch, length)

    def _once(self, cell: Cell) -> float:
        """Seconds of one step, or of all chunks of a prompt."""
        if cell.kind != "prefill":
            return self._timed(self._batch(cell, cell.context, cell.width))
        chunk = self._chunk if self._chunk and self._chunk > 0 else cell.width
        return sum(
            self._timed(self._batch(cell, first, min(chunk, cell.width - first)))
            for first in range(0, cell.width, chunk)
        )

    def _timed(self, batch: Any) -> float:
        with self._torch.inference_mode():
            began = time.perf_counter()
            output = self._runner.forward(batch)
            took = time.perf_counter() - began
        rows = output.logits_output.next_token_logits.shape[0]
        expected = (
            batch.batch_size
            if batch.forward_mode.is_extend_without_speculative()
            else len(batch.input_ids)
        )
        if rows != expected:
            raise ValueError(f"the model returned {rows} rows of logits; expected {expected}")
        return took

    def _batch(self, cell: Cell, context: int, width: int) -> Any:
        """`width` new tokens behind `context` for each request, as the scheduler would send."""
        from sglang.srt.model_executor.forward_batch_info import (
            CaptureHiddenMode,
            ForwardBatch,
            ForwardMode,
        )
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        from stateful_sglang.runtime.speculation.verify_input import LookupVerifyInput

        torch, count = self._torch, cell.batch
        rows = torch.arange(1, count + 1)
        positions = torch.arange(context, context + width).repeat(count)
        total = context if cell.kind == "verify" else context + width
        lengths = torch.full((count,), total)
        batch = ForwardBatch(
            forward_mode=ForwardMode.DECODE,
            batch_size=count,
            input_ids=torch.randint(self._vocabulary, (count * width,)),
            req_pool_indices=rows,
            seq_lens=lengths,
            out_cache_loc=self._table[rows, context : context + width].flatten().long(),
            seq_lens_sum=count * total,
            orig_seq_lens=lengths.int(),
            seq_lens_cpu=lengths,
            positions=positions,
            spec_algorithm=SpeculativeAlgorithm.NONE,
            capture_hidden_mode=CaptureHiddenMode.NULL,
            rids=[str(row) for row in range(count)],
            lora_ids=[None] * count,
        )
        batch.global_num_token_non_padded_cpu = count * width
        if cell.kind == "verify":
            batch.forward_mode = ForwardMode.TARGET_VERIFY
            batch.spec_info = LookupVerifyInput([width] * count, positions, width)
        elif cell.kind == "prefill":
            batch.forward_mode = ForwardMode.EXTEND
            batch.is_extend_in_batch = True
            batch.extend_num_tokens = count * width
            batch.extend_seq_lens = torch.full((count,), width, dtype=torch.int32)
            batch.extend_prefix_lens = torch.full((count,), context, dtype=torch.int32)
            batch.extend_start_loc = torch.arange(count, dtype=torch.int32) * width
            batch.extend_seq_lens_cpu = [width] * count
            batch.extend_prefix_lens_cpu = [context] * count
            batch.extend_logprob_start_lens_cpu = [width] * count
        return batch

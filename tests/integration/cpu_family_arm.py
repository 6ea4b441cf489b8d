"""Run by test_cpu_models in a process of its own: sessions with drafts against fresh requests.

``python cpu_family_arm.py FAMILY...``: of each family a tiny random model in float32 with the
default model's tokenizer. One scheduler serves interleaved sessions with drafts, another, without
sessions, drafts or a prefix cache, answers every turn's whole prompt afresh. Prints one JSON line a
family.

SGLang takes seconds to import and has one scheduler in a process, so it is imported once and each
scheduler lives in a fork. Nothing is computed before the forks: threads don't survive one.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import sys
import tempfile
import traceback
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from stateful_sglang.cpu.platform import prepare

prepare()

import torch  # noqa: E402 - SGLang and what it brings only after prepare()
import transformers  # noqa: E402
from cpu_model_arm import GEMMA, randomise  # noqa: E402
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput  # noqa: E402
from sglang.srt.managers.scheduler import Scheduler, configure_scheduler_process  # noqa: E402
from sglang.srt.models import registry  # noqa: E402, F401
from sglang.srt.runtime_context import SpawnRanks, publish, spawn_world_rank  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402
from sglang.srt.server_args import PortArgs  # noqa: E402

from stateful_sglang.attachments import check as attachments  # noqa: E402
from stateful_sglang.embedded import cache as model  # noqa: E402
from stateful_sglang.runtime.options import Options  # noqa: E402
from stateful_sglang.server import arguments, parser  # noqa: E402

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
TIED = GEMMA | {"tie_word_embeddings": True}


class Family(NamedTuple):
    """A tiny model of a family."""

    name: str
    """Of its classes in transformers."""
    quiet: float
    """What the layers' contributions are multiplied by; see `make_talkative`."""
    extra: dict[str, Any]


FAMILIES = {
    "llama": Family("Llama", 0.06, {}),
    "qwen3": Family("Qwen3", 0.07, {}),
    "qwen3-moe": Family("Qwen3Moe", 0.14, MOE | {"moe_intermediate_size": 64}),
    "mixtral": Family("Mixtral", 0.11, MOE | {"sliding_window": None}),
    "gemma2": Family("Gemma2", 4.0, TIED | {"hidden_act": "gelu_pytorch_tanh"}),
    "gemma3": Family("Gemma3Text", 4.0, TIED),
    "phi3": Family("Phi3", 0.07, {"sliding_window": None}),
    "olmo2": Family("Olmo2", 0.1, {}),
    "granite": Family("Granite", 0.15, {"embedding_multiplier": 3.0, "logits_scaling": 2.0}),
}
SESSIONS, TURNS, OUTPUT = 3, 3, 24
WIDTH = Options().max_draft + 1
"""Most tokens of a decode step."""


class Turn(NamedTuple):
    """One turn of a session as it was served."""

    prompt: list[int]
    output: list[int]
    steps: int
    """Decode steps after the prefill."""


def save_model(family: str, folder: Path) -> None:
    """A random model of the family, with the default model's tokenizer."""
    name, quiet, extra = FAMILIES[family]
    source = model.ensure_default_model()
    for file in source.glob("*token*"):
        shutil.copy(file, folder)
    default = transformers.AutoConfig.from_pretrained(source)
    kept = ("vocab_size", "eos_token_id", "bos_token_id", "pad_token_id")
    vocabulary = {field: getattr(default, field) for field in kept}
    config = getattr(transformers, f"{name}Config")(**(COMMON | vocabulary | extra))
    model_class = name.removesuffix("Text") + "ForCausalLM"
    config.architectures = [model_class]
    torch.manual_seed(0)
    made = getattr(transformers, model_class)._from_config(config).float()
    randomise(made, 1)
    make_talkative(made, quiet)
    made.save_pretrained(folder)


def make_talkative(made: Any, quiet: float) -> None:
    """Let a random model repeat itself, as models do, so that some drafts are right and some not.

    The layers add less to the residual; and where the LM head is a weight of its own, each token
    is followed by the next one of a ring of five.
    """
    last = ("o_proj.weight", "down_proj.weight", "down_proj", "w2.weight")
    if hasattr(made.model.layers[0], "post_feedforward_layernorm"):
        last = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
    for name, weight in made.named_parameters():
        if name.endswith(last):
            weight.data *= quiet
    if not made.config.tie_word_embeddings:
        rows = torch.arange(len(made.lm_head.weight))
        ring = torch.where(rows % 5 == 0, rows + 4, rows - 1).clamp(max=len(rows) - 1)
        made.lm_head.weight.data.copy_(made.model.embed_tokens.weight.data[ring])


class Rank:
    """A scheduler of the launcher's own making, stepped by hand."""

    def __init__(self, folder: Path, *given: str) -> None:
        argv = ["--model-path", str(folder), "--dtype", "float32", "--port", "0", *given]
        argv += ["--max-total-tokens", "4096", "--context-length", "512"]
        argv += ["--chunked-prefill-size", "64", "--disable-hybrid-swa-memory"]
        # What finds calls in answers is settled by the process that starts the ranks.
        argv += ["--dropin", "off"]
        args, _ = arguments.settle(*parser.parse(argv))
        ranks = SpawnRanks(world_rank=spawn_world_rank(args, tp_rank=0, pp_rank=0), gpu_id=0)
        publish(args, role="scheduler", ranks=ranks)
        configure_scheduler_process(args, 0)
        self.scheduler = Scheduler(args, PortArgs.init_new(args))

    def run(self, requests: list[TokenizedGenerateReqInput]) -> list[Any]:
        """Serve requests that arrive together; SGLang's request objects when all have ended."""
        scheduler = self.scheduler
        scheduler.process_input_requests(requests)
        reqs = list(scheduler.waiting_queue)
        assert len(reqs) == len(requests)
        while not all(req.finished() for req in reqs):
            plan = scheduler.get_next_batch_to_run(
                running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
            )
            scheduler.running_batch = plan.running_batch
            if plan.batch_to_run:
                result = scheduler.run_batch(plan.batch_to_run)
                scheduler.process_batch_result(plan.batch_to_run, result)
            scheduler.last_batch = plan.batch_to_run
        return reqs


def fields(rid: str, ids: list[int]) -> dict[str, Any]:
    """A greedy request as the API process would tokenise it."""
    sampling = SamplingParams(temperature=0, max_new_tokens=OUTPUT, ignore_eos=True)
    sampling.normalize(None)
    none = ("input_text", "input_embeds", "mm_inputs", "token_type_ids", "token_ids_logprob")
    return {
        **dict.fromkeys(none),
        "rid": rid,
        "input_ids": array("q", ids),
        "sampling_params": sampling,
        "return_logprob": False,
        "logprob_start_len": -1,
        "top_logprobs_num": 0,
        "stream": False,
    }


@torch.no_grad()
def serve_sessions(folder: Path) -> list[Turn]:
    """Every turn of some sessions that share a beginning, with drafts."""
    from stateful_sglang.runtime.sessions.requests import SessionAppendReq

    rank = Rank(folder)
    rng = random.Random(3)
    shared = [rng.randrange(100, 40000) for _ in range(70)]
    transcripts: list[list[int]] = [[] for _ in range(SESSIONS)]
    turns = []
    for number in range(TURNS):
        requests = []
        for session, said in enumerate(transcripts):
            delta = shared if number == 0 else said[-rng.randrange(8, 40) :]
            delta = [*delta, *(rng.randrange(100, 40000) for _ in range(rng.randrange(1, 9)))]
            append = {"stateful_session": f"s{session}", "base_len": len(said)}
            rid = f"{session}-{number}".rjust(32, "0")
            requests.append(SessionAppendReq(**fields(rid, delta), **append))
            said.extend(delta)
        for said, req in zip(transcripts, rank.run(requests), strict=True):
            output = list(req.output_ids_through_stop)
            turns.append(Turn(list(said), output, req.spec_verify_ct))
            said.extend(output)
        rank.scheduler.tree_cache.check_integrity()
    return turns


@torch.no_grad()
def answer_afresh(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Each prompt's answer by a server that keeps nothing and drafts nothing."""
    rank = Rank(folder, "--stateful", "off", "--disable-radix-cache", "--skip-tokenizer-init")
    requests = [TokenizedGenerateReqInput(**fields(str(i), p)) for i, p in enumerate(prompts)]
    return [list(req.output_ids_through_stop) for req in rank.run(requests)]


def forked(work: Callable[[], Any], result: Path) -> Any:
    """What `work` returns in a process of its own.

    Raises:
        SystemExit: It failed; its traceback is on standard error.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            result.write_text(json.dumps(work()))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    if os.waitpid(child, 0)[1] != 0:
        raise SystemExit(f"{work} failed")
    return json.loads(result.read_text())


def compare(family: str) -> dict[str, Any]:
    """How many turns and tokens were served, in how many steps, and which turns differ."""
    with tempfile.TemporaryDirectory() as made:
        folder, result = Path(made) / "model", Path(made) / "result.json"
        folder.mkdir()
        forked(lambda: save_model(family, folder), result)
        turns = [Turn(*each) for each in forked(lambda: serve_sessions(folder), result)]
        prompts = [turn.prompt for turn in turns]
        afresh = forked(lambda: answer_afresh(folder, prompts), result)
    return {
        "family": family,
        "turns": len(turns),
        "asked": OUTPUT,
        "tokens": sum(len(turn.output) for turn in turns),
        "steps": sum(turn.steps for turn in turns),
        "fewest_steps": len(turns) * math.ceil((OUTPUT - 1) / WIDTH),
        "differing": [i for i, turn in enumerate(turns) if turn.output != afresh[i]],
    }


if __name__ == "__main__":
    attachments.check()  # Every fork checks them; what is parsed here is not parsed there again.
    for each in sys.argv[1:]:
        print(json.dumps(compare(each)), flush=True)

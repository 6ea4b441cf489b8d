"""The CPU engine's logits against transformers in float64, and its greedy tokens in float32.

Each prompt runs through our layers in bfloat16, in float32 and with int8 weights, through
transformers in bfloat16 and in float64, all from the same checkpoint. Printed: the relative error
of all logits of a prompt, median and largest over the prompts, for ours and for plain torch; how
often int8 has another best token than float64, and by how much less likely a token int8 makes the
text; and the number of greedy tokens in which our float32 engine differs from transformers run from
scratch in float32. Exit status 1 if ours is less exact than torch's bfloat16, or if a greedy token
differs without a tie below 1e-4.

    python -m bench cpu_logits --prompts 50 --tokens 24
"""

from __future__ import annotations

import statistics
from typing import Annotated, Any

import torch
import typer

from bench import corpus
from bench.engines import package
from bench.engines.layers import Layers
from bench.harness.figures import report
from bench.harness.options import Json
from bench.harness.rounds import progress

TIE = 1e-4
"""Logits closer than this are a tie."""


def pieces(count: int, tokenizer: Any) -> list[torch.Tensor]:
    """Token ids [n] of `count` pieces of the corpus's code, 8 to 64 tokens each."""
    ids = tokenizer(corpus.code(), return_tensors="pt").input_ids[0]
    gen = torch.Generator().manual_seed(0)
    cut = []
    for _ in range(count):
        n = int(torch.randint(8, 64, (1,), generator=gen))
        at = int(torch.randint(0, len(ids) - n, (1,), generator=gen))
        cut.append(ids[at : at + n])
    return cut


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want| over all logits of a prompt."""
    return ((got.double() - want).norm() / want.norm()).item()


def text_loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Mean negative log-likelihood of a prompt's tokens after the first, in nats."""
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).item()


@torch.no_grad()
def greedy_differences(layers: Layers, model: Any, ids: torch.Tensor, tokens: int) -> list[float]:
    """Gap between the best logit and ours at the first greedy token that differs, [] if none does.

    Ours continues token by token. Transformers sees the whole transcript once, from scratch: as
    long as every token so far was its best one too, that is its own greedy decoding.
    """
    past, new, sequence = 0, ids, ids
    for _ in range(tokens):
        past, new = len(sequence), layers.logits(new, past)[-1].argmax()[None]
        sequence = torch.cat([sequence, new])
    logits = model(sequence[None]).logits[0]
    for at in range(len(ids) - 1, len(sequence) - 1):
        gap = (logits[at].max() - logits[at, sequence[at + 1]]).item()
        if gap > 0:
            return [gap]
    return []


@torch.no_grad()
def main(
    prompts: Annotated[int, typer.Option(min=1, help="Pieces of text.")] = 50,
    tokens: Annotated[int, typer.Option(min=1, help="Greedy tokens a prompt.")] = 24,
    json: Json = None,
) -> int:
    """Run the comparison; see the module's docstring."""
    package.prepare()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(package.default_model())
    tokenizer = AutoTokenizer.from_pretrained(path)
    exact = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    single = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    half = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    ours = {dtype: Layers(single, dtype) for dtype in (torch.bfloat16, torch.float32)}
    int8 = Layers(single, torch.bfloat16, int8=True)
    errors: dict[str, list[float]] = {
        name: [] for name in ("ours bf16", "torch bf16", "ours f32", "ours int8")
    }
    other_best, losses = 0, []
    gaps: list[float] = []
    cut = pieces(prompts, tokenizer)
    for ids in progress(cut, "prompts"):
        want = exact(ids[None]).logits[0]
        errors["ours bf16"].append(relative(ours[torch.bfloat16].logits(ids), want))
        errors["torch bf16"].append(relative(half(ids[None]).logits[0], want))
        errors["ours f32"].append(relative(ours[torch.float32].logits(ids), want))
        rounded = int8.logits(ids).double()
        errors["ours int8"].append(relative(rounded, want))
        other_best += int((rounded.argmax(-1) != want.argmax(-1)).sum())
        losses.append([text_loss(logits, ids) for logits in (rounded, want)])
        gaps += greedy_differences(ours[torch.float32], single, ids, tokens)
    print(f"{prompts} prompts, {sum(map(len, cut))} tokens; relative error of logits")
    figures: dict[str, float] = {}
    for name, values in errors.items():
        print(f"  {name:10s} median {statistics.median(values):.2e}  largest {max(values):.2e}")
        figures[name.replace(" ", "_") + "_median"] = statistics.median(values)
        figures[name.replace(" ", "_") + "_max"] = max(values)
    total = sum(map(len, cut))
    worse_by = statistics.mean(a - b for a, b in losses)
    print(
        f"int8: another best token at {other_best} of {total} positions; "
        f"{worse_by:+.4f} nats a token of text"
    )
    figures["int8_other_best_share"] = other_best / total
    figures["int8_nats_a_token"] = worse_by
    figures["greedy_tokens"] = prompts * tokens
    figures["greedy_prompts_differing"] = len(gaps)
    print(f"greedy float32: {len(gaps)} of {prompts} prompts differ {gaps}")
    report(figures, json)
    worse = figures["ours_bf16_median"] > figures["torch_bf16_median"]
    return int(worse or any(gap >= TIE for gap in gaps))

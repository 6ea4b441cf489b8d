"""The CPU engine's logits against transformers in float64, and its greedy tokens in float32.

``python -m bench.suites.cpu_logits [--prompts 50] [--tokens 24] [--json FILE]``

Each prompt runs through our layers in bfloat16, in float32 and with int8 weights, through
transformers in bfloat16 and in float64, all from the same checkpoint. Printed: the relative error
of all logits of a prompt, median and largest over the prompts, for ours and for plain torch; how
often int8 has another best token than float64, and by how much less likely a token int8 makes the
text; and the number of greedy tokens in which our float32 engine differs from transformers run from
scratch in float32. Exit status 1 if ours is less exact than torch's bfloat16, or if a greedy token
differs without a tie below 1e-4.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

PROMPTS = Path(__file__).resolve().parents[2]


def prompts(count: int, tokenizer: Any) -> list[torch.Tensor]:
    """Token ids [n] of `count` pieces of this repository's own text, 8 to 64 tokens each."""
    text = "".join(p.read_text() for p in sorted(PROMPTS.glob("stateful_sglang/**/*.py")))
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    gen = torch.Generator().manual_seed(0)
    cut = []
    for _ in range(count):
        n = int(torch.randint(8, 64, (1,), generator=gen))
        at = int(torch.randint(0, len(ids) - n, (1,), generator=gen))
        cut.append(ids[at : at + n])
    return cut


class Engine:
    """Our layers and LM head under a transformers Llama's weights, one sequence."""

    def __init__(
        self, model: Any, dtype: torch.dtype, int8: bool = False, slots: int = 1024
    ) -> None:
        from stateful_sglang.cpu import ops
        from stateful_sglang.cpu.decoder import DecoderLayer, DecoderShape, DecoderStack

        config = model.config
        dim = config.hidden_size // config.num_attention_heads
        angles = torch.outer(torch.arange(slots).float(), model.model.rotary_emb.inv_freq.float())
        rope = torch.cat([angles.cos(), angles.sin()], 1)
        shape = DecoderShape(
            hidden=config.hidden_size,
            inter=config.intermediate_size,
            q_heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=dim,
            rotary_dim=dim,
            neox=True,
            act="silu",
            eps=config.rms_norm_eps,
        )

        def packed(*parts: Any, gated: bool = False) -> ops.Packed:
            return ops.pack(torch.cat([p.weight.data.to(dtype) for p in parts]), gated, int8)

        layers = [
            DecoderLayer(
                input_norm=layer.input_layernorm.weight.data.float(),
                post_norm=layer.post_attention_layernorm.weight.data.float(),
                qkv=packed(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                o=packed(layer.self_attn.o_proj),
                gate_up=packed(layer.mlp.gate_proj, layer.mlp.up_proj, gated=True),
                down=packed(layer.mlp.down_proj),
                rope_cache=rope,
                scale=dim**-0.5,
            )
            for layer in model.model.layers
        ]
        self.stack = DecoderStack(shape, layers, model.model.norm.weight.data.float(), dtype)
        self.stack.bind_pools(
            [
                tuple(torch.zeros(slots, shape.kv_heads, dim, dtype=dtype) for _ in range(2))
                for _ in layers
            ]
        )
        self.embedding = model.model.embed_tokens.weight.data.to(dtype)
        self.head = packed(model.lm_head)
        self.table = torch.randperm(slots, generator=torch.Generator().manual_seed(0))
        self.table = self.table.to(torch.int32)[None]

    def logits(self, ids: torch.Tensor, past: int = 0) -> torch.Tensor:
        """Float32 logits [n, vocab] of the tokens ids [n] that follow `past` earlier ones."""
        from stateful_sglang.cpu import ops
        from stateful_sglang.cpu.plan import plan_step

        total = past + len(ids)
        plan = plan_step(self.table, torch.tensor([0]), [len(ids)], [total])
        hidden = self.stack.run(
            self.embedding[ids],
            torch.arange(past, total),
            self.table[0, past:total].long(),
            plan,
        )
        return ops.linear(hidden, self.head, out_dtype=torch.float32)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want| over all logits of a prompt."""
    return ((got.double() - want).norm() / want.norm()).item()


def text_loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Mean negative log-likelihood of a prompt's tokens after the first, in nats."""
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).item()


@torch.no_grad()
def greedy_differences(engine: Engine, model: Any, ids: torch.Tensor, tokens: int) -> list[float]:
    """Gap between the best logit and ours at the first greedy token that differs, [] if none does.

    Ours continues token by token. Transformers sees the whole transcript once, from scratch: as
    long as every token so far was its best one too, that is its own greedy decoding.
    """
    past, new, sequence = 0, ids, ids
    for _ in range(tokens):
        past, new = len(sequence), engine.logits(new, past)[-1].argmax()[None]
        sequence = torch.cat([sequence, new])
    logits = model(sequence[None]).logits[0]
    for at in range(len(ids) - 1, len(sequence) - 1):
        gap = (logits[at].max() - logits[at, sequence[at + 1]]).item()
        if gap > 0:
            return [gap]
    return []


@torch.no_grad()
def main() -> int:
    """Run the comparison; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=24, help="greedy tokens a prompt")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    from stateful_sglang.cpu.platform import prepare

    prepare()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stateful_sglang.embedded.cache import ensure_default_model

    path = str(ensure_default_model(None))
    tokenizer = AutoTokenizer.from_pretrained(path)
    exact = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    single = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    half = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    ours = {dtype: Engine(single, dtype) for dtype in (torch.bfloat16, torch.float32)}
    int8 = Engine(single, torch.bfloat16, int8=True)
    errors: dict[str, list[float]] = {
        name: [] for name in ("ours bf16", "torch bf16", "ours f32", "ours int8")
    }
    other_best, losses = 0, []
    gaps: list[float] = []
    cut = prompts(args.prompts, tokenizer)
    for done, ids in enumerate(cut):
        if sys.stderr.isatty():
            print(f"\r{done}/{len(cut)} prompts", end="", file=sys.stderr, flush=True)
        want = exact(ids[None]).logits[0]
        errors["ours bf16"].append(relative(ours[torch.bfloat16].logits(ids), want))
        errors["torch bf16"].append(relative(half(ids[None]).logits[0], want))
        errors["ours f32"].append(relative(ours[torch.float32].logits(ids), want))
        rounded = int8.logits(ids).double()
        errors["ours int8"].append(relative(rounded, want))
        other_best += int((rounded.argmax(-1) != want.argmax(-1)).sum())
        losses.append([text_loss(logits, ids) for logits in (rounded, want)])
        gaps += greedy_differences(ours[torch.float32], single, ids, args.tokens)
    print(f"{args.prompts} prompts, {sum(map(len, cut))} tokens; relative error of logits")
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
    figures["greedy_tokens"] = args.prompts * args.tokens
    figures["greedy_prompts_differing"] = len(gaps)
    print(f"greedy float32: {len(gaps)} of {args.prompts} prompts differ {gaps}")
    if args.json:
        args.json.write_text(json.dumps({"figures": figures}, indent=1))
    worse = figures["ours_bf16_median"] > figures["torch_bf16_median"]
    return int(worse or any(gap >= 1e-4 for gap in gaps))


if __name__ == "__main__":
    sys.exit(main())

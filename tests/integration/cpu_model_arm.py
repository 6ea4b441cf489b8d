"""Run by test_cpu_models in a process of its own: SGLang's model runner against transformers.

``python cpu_model_arm.py FAMILY stack|modules [int8]``: a tiny random model of that family, saved
as a checkpoint, through SGLang's own loader, scheduler batches and runner with our kernels
attached; logits of two prompts and of greedy steps after them are compared with transformers in
float32, then all weights are changed through SGLang's weight updater and compared again. Prints one
JSON line.
"""

from __future__ import annotations

import json
import sys
import tempfile
from array import array

from stateful_sglang.cpu.platform import prepare

prepare()

import torch  # noqa: E402
import transformers  # noqa: E402

COMMON = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": 0,
}
GEMMA = {"sliding_window": 24, "query_pre_attn_scalar": 32, "attention_bias": False}
FAMILIES = {
    "llama": ("Llama", {"rope_theta": 10000.0}),
    "llama-rope-scaled": (
        "Llama",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "tie_word_embeddings": False,
        },
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"num_attention_heads": 8, "head_dim": 16}),
    "qwen3": ("Qwen3", {"num_attention_heads": 8}),
    "gemma2": (
        "Gemma2",
        GEMMA
        | {
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
            "hidden_act": "gelu_pytorch_tanh",
        },
    ),
    "gemma3": ("Gemma3Text", GEMMA),
}


def reference(family: str) -> transformers.PreTrainedModel:
    """A random model whose norms and biases matter."""
    name, extra = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(COMMON | extra))
    model_class = "Gemma3ForCausalLM" if name == "Gemma3Text" else f"{name}ForCausalLM"
    config.architectures = [model_class]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)._from_config(config, attn_implementation="eager")
    randomise(model, 1)
    return model.float().eval()


def randomise(model: torch.nn.Module, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        scale = 0.2 if p.dim() == 1 else 1.5 * p.shape[1] ** -0.5
        noise = torch.randn(p.shape, generator=gen) * scale
        offset = 1.0 if name.endswith("norm.weight") and "Gemma" not in type(model).__name__ else 0
        p.data.copy_(noise + offset)


def runner_for(path: str):
    from sglang.benchmark import one_batch
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.server_args import PortArgs, ServerArgs

    from stateful_sglang import cpu

    cpu.attach()
    HookRegistry.apply_hooks()
    args = ServerArgs(
        model_path=path,
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        dtype="float32",
        max_total_tokens=2048,
        max_running_requests=8,
        context_length=256,
        mem_fraction_static=0.5,
        disable_cuda_graph=True,
        skip_tokenizer_init=True,
        disable_hybrid_swa_memory=True,
        random_seed=0,
    )
    one_batch.get_tokenizer = lambda *_, **__: None
    one_batch.suppress_other_loggers = lambda: None
    ports = PortArgs.init_new(args)
    one_batch.publish(
        args,
        role="scheduler",
        ranks=one_batch.SpawnRanks(
            world_rank=one_batch.spawn_world_rank(args, tp_rank=0, pp_rank=0), gpu_id=0
        ),
    )
    runner, _ = one_batch.load_model(args, ports, 0, 0)
    return runner


@torch.no_grad()
def worst_error(runner, model, prompts: list[list[int]], steps: int) -> tuple[float, int]:
    """Largest difference of logits, relative to their size, and greedy tokens that differ."""
    from sglang.benchmark import one_batch

    reqs = one_batch.prepare_synthetic_inputs_for_latency_test(
        len(prompts), 0, [array("q", p) for p in prompts]
    )
    sequences = [list(p) for p in prompts]
    worst, differing = 0.0, 0
    tokens, logits, batch = runner.extend(reqs)
    for step in range(steps + 1):
        for i, sequence in enumerate(sequences):
            want = model(torch.tensor([sequence])).logits[0, -1]
            worst = max(worst, ((logits[i] - want).norm() / want.norm()).item())
            differing += int(want.argmax() != tokens[i])
            sequence.append(int(tokens[i]))
        if step < steps:
            tokens, logits = runner.decode(tokens, batch)
    runner.clear()
    return worst, differing


def main() -> None:
    family, path = sys.argv[1:3]
    int8 = sys.argv[3:] == ["int8"]
    if path == "modules":
        from stateful_sglang.cpu import dense_models

        dense_models.family_of = lambda _class_name: None
    from stateful_sglang.cpu import modules

    said: list[str] = []
    attach = modules.attach_to_model
    modules.attach_to_model = lambda model, **_: said.append(attach(model, int8=int8))

    model = reference(family)
    gen = torch.Generator().manual_seed(5)
    prompts = [torch.randint(2, 512, (n,), generator=gen).tolist() for n in (60, 7)]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        runner = runner_for(folder)
    error, differing = worst_error(runner, model, prompts, 4)
    randomise(model, 2)
    updater = runner.torch_runner.weight_updater
    weights = [(k, v) for k, v in model.state_dict().items() if k != "lm_head.weight"]
    if not model.config.tie_word_embeddings:
        weights.append(("lm_head.weight", model.state_dict()["lm_head.weight"]))
    ok, message = updater.update_weights_from_tensor(weights)
    assert ok, message
    again, differing_again = worst_error(runner, model, prompts, 2)
    print(
        json.dumps(
            {
                "said": said,
                "error": error,
                "differing": differing,
                "error_after_update": again,
                "differing_after_update": differing_again,
            }
        )
    )


if __name__ == "__main__":
    main()

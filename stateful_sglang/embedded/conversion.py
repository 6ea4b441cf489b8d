"""Turns the embedded GGUF into a checkpoint that SGLang loads. Run as a process by `model.py`.

Weights go through `transformers`, which de-quantises them. The tokenizer does not: what its GGUF
reader makes of one changes with its release (up to 5.12 another end token, no splitting of digits,
Llama's decoding). It is built here from the vocabulary and merges in the file, after SmolLM2's
published tokenizer.json.

Progress is one line a stage on standard output.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def _stage(name: str) -> None:
    print(name, flush=True)


def _fields(gguf: Path) -> dict[str, Any]:
    """The tokenizer's metadata in `gguf`, by key without its prefix."""
    from gguf import GGUFReader

    prefix = "tokenizer."
    fields = GGUFReader(str(gguf)).fields
    return {k.removeprefix(prefix): f.contents() for k, f in fields.items() if k.startswith(prefix)}


def save_tokenizer(gguf: Path, out: Path, max_length: int) -> None:
    """Write the tokenizer and chat template of `gguf` into `out`.

    Raises:
        ValueError: the file holds another kind of tokenizer than this was written for.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    meta = _fields(gguf)
    kind = (meta["ggml.model"], meta["ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"{gguf.name} has a {kind} tokenizer; expected ('gpt2', 'smollm')")
    tokens: list[str] = meta["ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in meta["ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # ggml's token type for control tokens
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, meta["ggml.token_type"], strict=True)
            if kind == control
        ]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[meta["ggml.bos_token_id"]],
        eos_token=tokens[meta["ggml.eos_token_id"]],
        pad_token=tokens[meta["ggml.padding_token_id"]],
        unk_token=tokens[meta["ggml.unknown_token_id"]],
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        chat_template=meta["chat_template"],
    ).save_pretrained(out)


def convert(gguf: Path, out: Path) -> None:
    """Write `gguf` into the folder `out` as a bf16 checkpoint with tokenizer and chat template."""
    _stage("loading transformers")
    from stateful_sglang.cpu.platform import prepare

    prepare()
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    _stage("de-quantising the weights")
    read = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    # What comes from a GGUF counts as quantised for ever, and is not saved: a plain model is.
    model = transformers.AutoModelForCausalLM.from_config(read.config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    _stage("writing the checkpoint")
    model.save_pretrained(out)
    _stage("writing the tokenizer")
    save_tokenizer(gguf, out, max_length=model.config.max_position_embeddings)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))

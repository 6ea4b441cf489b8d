"""A random model of a few layers with a tokenizer of bytes: for what is about sessions, not text.

Written as files, so that neither SGLang nor torch is loaded for it. In float32 it answers the same
prompt with the same tokens however the prompt was cut into turns.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CHATML = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] "
    "+ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
START, END = "<|im_start|>", "<|im_end|>"
VOCABULARY = 258
_HIDDEN, _INNER, _HEADS, _KV_HEADS = 64, 96, 4, 2
_END_WEIGHT = 2.5
"""Longer than the other tokens' rows of the LM head: some answers end before their limit."""


def save(folder: Path, *, layers: int, context: int = 4096, seed: int = 0) -> Path:
    """Write a model; returns its folder.

    With one layer the KV of a token depends on nothing before it, so that KV of another prompt may
    go unnoticed: what is about exactness takes two.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    save_file(_weights(layers, end, seed), folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "vocab_size": VOCABULARY,
        "hidden_size": _HIDDEN,
        "intermediate_size": _INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HIDDEN // _HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": end,
    }
    (folder / "config.json").write_text(json.dumps(config))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _tokenizer() -> Tokenizer:
    """Every byte a token, and ChatML's two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: at for at, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (START, END)])
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer


def _weights(layers: int, end: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        values = rng.standard_normal((rows, columns)) * gain / columns**0.5
        return values.astype(np.float32)

    keys = _HIDDEN // _HEADS * _KV_HEADS
    weights = {
        "model.embed_tokens.weight": matrix(VOCABULARY, _HIDDEN, _HIDDEN**0.5),
        "model.norm.weight": np.ones(_HIDDEN, np.float32),
        "lm_head.weight": matrix(VOCABULARY, _HIDDEN),
    }
    weights["lm_head.weight"][end] *= _END_WEIGHT
    for number in range(layers):
        at = f"model.layers.{number}"
        weights |= {
            f"{at}.self_attn.q_proj.weight": matrix(_HIDDEN, _HIDDEN, 2.0),
            f"{at}.self_attn.k_proj.weight": matrix(keys, _HIDDEN, 2.0),
            f"{at}.self_attn.v_proj.weight": matrix(keys, _HIDDEN, 2.0),
            f"{at}.self_attn.o_proj.weight": matrix(_HIDDEN, _HIDDEN, 2.0),
            f"{at}.mlp.gate_proj.weight": matrix(_INNER, _HIDDEN),
            f"{at}.mlp.up_proj.weight": matrix(_INNER, _HIDDEN),
            f"{at}.mlp.down_proj.weight": matrix(_HIDDEN, _INNER),
            f"{at}.input_layernorm.weight": np.ones(_HIDDEN, np.float32),
            f"{at}.post_attention_layernorm.weight": np.ones(_HIDDEN, np.float32),
        }
    return weights

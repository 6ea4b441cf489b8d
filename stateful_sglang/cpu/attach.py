"""What the CPU room attaches to SGLang, and the attaching itself."""

from __future__ import annotations

from typing import Any

from stateful_sglang.attachments.check import Attachment
from stateful_sglang.cpu import layers, platform

_LAYERS = "sglang.srt.layers"

ATTACHMENTS: tuple[Attachment, ...] = (
    Attachment(
        f"{_LAYERS}.attention.attention_registry.create_torch_native_backend",
        "registry",
        "on a CPU the registry entry torch_native makes our backend, whose work is in proportion "
        "to new tokens; its name tells SGLang not to use Triton",
    ),
    Attachment(
        f"{_LAYERS}.attention.torch_native_backend.TorchNativeAttnBackend",
        "subclass",
        "our backend leaves cross-attention to it",
    ),
    Attachment(
        "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool.set_kv_buffer",
        "relies",
        "our backend writes new keys and values itself where this would be a plain copy",
    ),
    Attachment(
        "sglang.srt.utils.common.support_triton",
        "relies",
        "the name torch_native is what keeps Triton kernels off the CPU",
    ),
    *layers.ATTACHMENTS,
    Attachment(
        "sglang.srt.layers.radix_attention.RadixAttention.__init__",
        "relies",
        "the sizes, scale, cap and window that our backend reads of a layer",
    ),
    Attachment(
        "sglang.srt.mem_cache.memory_pool.KVWriteLoc",
        "relies",
        "where the pool's own writing of keys and values is told to put them",
    ),
    Attachment(
        "sglang.srt.mem_cache.swa_memory_pool.SWAKVPool",
        "relies",
        "models with two pools are left to SGLang's backend",
    ),
    Attachment(
        "sglang.srt.model_executor.forward_context.get_attn_backend",
        "relies",
        "the decoder stack asks for the backend of the pass",
    ),
    Attachment(
        "sglang.srt.layers.vocab_parallel_embedding.VocabParallelEmbedding.__init__",
        "relies",
        "which LM heads are whole and plain, so that they can be packed",
    ),
    Attachment(
        "sglang.srt.layers.linear.LinearBase.__init__",
        "relies",
        "the linear layers that are packed, and their method",
    ),
)


def attach(*, int8: bool = False) -> None:
    """Make SGLang's CPU device use our engine; nothing happens where it runs on an accelerator.

    Args:
        int8: Round the weights of linear layers and of the LM head to int8.
    """
    if platform.has_accelerator():
        return
    from sglang.srt.layers.attention import attention_registry

    attention_registry.ATTENTION_BACKENDS["torch_native"] = _create_backend
    layers.attach(int8=int8)


def _create_backend(runner: Any) -> Any:
    from sglang.srt.layers.attention.attention_registry import create_torch_native_backend

    if runner.device != "cpu":
        return create_torch_native_backend(runner)
    from stateful_sglang.cpu.attention import CpuAttentionBackend

    return CpuAttentionBackend(runner)

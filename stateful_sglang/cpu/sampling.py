"""Drawing tokens from filtered probabilities on a CPU, in place of a sort of the vocabulary."""

from __future__ import annotations

from typing import Any

import torch

from stateful_sglang.cpu import abi
from stateful_sglang.cpu.ops import library


def sample(
    probs: torch.Tensor,
    *,
    top_ks: torch.Tensor | None = None,
    top_ps: torch.Tensor | None = None,
    min_ps: torch.Tensor | None = None,
    uniform: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token a row, from its probabilities after top-k, top-p and min-p, all taken jointly.

    A token stays while fewer than k tokens are likelier, their mass is at most p, and it is at
    least min_p times as likely as the likeliest; of equals the lower index comes first.

    Args:
      probs: [rows, vocab] float32, not negative, of any scale.
      top_ks, top_ps, min_ps: [rows]; None leaves that filter out. A k outside 1..vocab means all.
      uniform: [rows] float64 in [0, 1): the noise, spent by inversion of the cumulative mass.
      seeds, positions: [rows], in place of `uniform`: the noise is a function of these two alone,
        so that a position's token depends neither on the batch nor on how it was verified.

    Returns:
      [rows] int64.
    Raises:
      ValueError: probs of another dtype or shape, or no noise.
    """
    if probs.dtype != torch.float32 or probs.dim() != 2 or probs.stride(1) != 1:
        raise ValueError(
            f"sample: probs must be float32 [rows, vocab], contiguous in vocab; got {probs.dtype} "
            f"{list(probs.shape)}, strides {probs.stride()}."
        )
    if uniform is None and (seeds is None or positions is None):
        raise ValueError("sample: pass either uniform or both seeds and positions.")
    out = torch.empty(probs.shape[0], dtype=torch.int64)
    held = {
        "top_k": _as(top_ks, torch.int64),
        "top_p": _as(top_ps, torch.float32),
        "min_p": _as(min_ps, torch.float32),
        "uniform": _as(uniform, torch.float64),
        "seed": _as(seeds, torch.int64),
        "position": _as(positions, torch.int64),
    }
    for name, tensor in held.items():
        if tensor is not None and tensor.numel() != probs.shape[0]:
            raise ValueError(f"sample: {name} has {tensor.numel()} of {probs.shape[0]} rows.")
    call = abi.Sample(
        rows=probs.shape[0],
        vocab=probs.shape[1],
        probs=probs.data_ptr(),
        row_stride=probs.stride(0),
        out=out.data_ptr(),
        **{name: None if t is None else t.data_ptr() for name, t in held.items()},
    )
    library().sg_sample(call)
    return out


def _as(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if tensor is None else tensor.reshape(-1).to(dtype).contiguous()


def around_sample(
    original: Any, probs: torch.Tensor, sampling_seed: Any = None, positions: Any = None
) -> torch.Tensor:
    """SGLang's unfiltered sampler; seeded sampling and other devices stay its own."""
    if sampling_seed is not None or not _ours(probs):
        return original(probs, sampling_seed, positions)
    return sample(probs, uniform=_noise(probs)).to(torch.int32)


def around_filtered_sample(
    original: Any,
    probs: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    need_min_p_sampling: bool,
    sampling_seed: Any,
    positions: Any,
    *,
    return_filtered_probs: bool = False,
    max_top_k: int | None = None,
) -> Any:
    """SGLang's sampler with filters, likewise; where it must hand out what it kept, it sorts.

    `max_top_k` bounds every k, which spares SGLang's own sampler the sort; ours never sorts.
    """
    if sampling_seed is not None or return_filtered_probs or not _ours(probs):
        return original(
            probs,
            top_ks,
            top_ps,
            min_ps,
            need_min_p_sampling,
            sampling_seed,
            positions,
            return_filtered_probs=return_filtered_probs,
            max_top_k=max_top_k,
        )
    return sample(
        probs,
        top_ks=top_ks,
        top_ps=top_ps,
        min_ps=min_ps if need_min_p_sampling else None,
        uniform=_noise(probs),
    ).to(torch.int32)


def _ours(probs: torch.Tensor) -> bool:
    return probs.device.type == "cpu" and probs.dtype == torch.float32 and probs.stride(-1) == 1


def _noise(probs: torch.Tensor) -> torch.Tensor:
    return torch.rand(probs.shape[0], dtype=torch.float64)

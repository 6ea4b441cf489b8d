"""The kernels as functions on tensors: checks, strides, output buffers.

Every function needs `extension.load()` to have succeeded. Tensors are bfloat16 or float32 on the
CPU; results are bit for bit independent of the batch, the number of threads and the other rows.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from stateful_sglang.cpu import abi
from stateful_sglang.cpu.extension import load

_DTYPES = {torch.float32: abi.F32, torch.bfloat16: abi.BF16}
ACTIVATIONS = {"silu": abi.SILU, "gelu_tanh": abi.GELU_TANH, "gelu": abi.GELU}


def library() -> ctypes.CDLL:
    """The loaded kernels."""
    extension = load()
    if extension is None:
        raise RuntimeError("The CPU kernels are not loaded: check extension.load() first.")
    return extension.lib


def supports(dtype: torch.dtype, inner: int) -> bool:
    """Whether the kernels take this dtype with an inner dimension of `inner` elements."""
    return dtype in _DTYPES and (dtype == torch.float32 or inner % 2 == 0)


def _dense_last(tensor: torch.Tensor, name: str) -> torch.Tensor:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: the last dimension must be contiguous, got {tensor.stride()}.")
    return tensor


def _i64(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.int64).contiguous()


def attention(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    q_starts: torch.Tensor,
    scale: float,
    *,
    k_new: torch.Tensor | None = None,
    v_new: torch.Tensor | None = None,
    out_cache_loc: torch.Tensor | None = None,
    logit_cap: float = 0.0,
    window: int = -1,
    causal: bool = True,
    mask: torch.Tensor | None = None,
    mask_offsets: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over a token-indexed KV pool: extend, decode and verify in one call.

    Args:
      q: [tokens, q_heads, head_dim] queries of all requests, one after the other.
      k_pool, v_pool: [slots, kv_heads, head_dim], any stride but in the last dimension.
      req_to_token: [requests, positions] int32, slot of each position.
      req_pool_indices: [batch] row of `req_to_token` of each request.
      seq_lens: [batch] positions of each request, the new ones included.
      q_starts: [batch + 1] first row of q of each request, then tokens.
      scale: factor on q . k.
      k_new, v_new, out_cache_loc: [tokens, kv_heads, head_dim] and [tokens] slots; written to the
        pools first when given.
      logit_cap: cap * tanh(score / cap) where above 0.
      window: a query at position p sees keys from p - window on; below 0 all.
      causal: False: every query sees every key of its request.
      mask: bool, per request [n, n] of its n new rows, flattened one after the other, in the place
        of the causal chain among them; what was there before is seen whole.
      mask_offsets: [batch] first element of each request's mask; below 0: causal chain.
      out: like q; filled and returned when given.

    Returns:
      [tokens, q_heads, head_dim]; zero for a query that may see no key.
    Raises:
      ValueError: shapes, dtypes or strides do not fit together.
    """
    tokens, q_heads, head_dim = q.shape
    kv_heads = k_pool.shape[1]
    if not q.dtype == k_pool.dtype == v_pool.dtype or not supports(q.dtype, head_dim):
        raise ValueError(
            f"attention: q, k_pool and v_pool must all be float32 or bfloat16 with an even head_dim"
            f", got {q.dtype}, {k_pool.dtype}, {v_pool.dtype}, head_dim {head_dim}."
        )
    if k_pool.shape[1:] != v_pool.shape[1:] or k_pool.shape[2] != head_dim or q_heads % kv_heads:
        raise ValueError(
            f"attention: pools {list(k_pool.shape)}, {list(v_pool.shape)} do not fit "
            f"q {list(q.shape)}: the same head_dim and a multiple of the KV heads expected."
        )
    for name, tensor in (("q", q), ("k_pool", k_pool), ("v_pool", v_pool)):
        _dense_last(tensor, f"attention: {name}")
    if out is None:
        out = torch.empty((tokens, q_heads, head_dim), dtype=q.dtype)
    if req_to_token.dtype != torch.int32:
        raise ValueError(f"attention: req_to_token must be int32, got {req_to_token.dtype}.")
    index, lens, starts = _i64(req_pool_indices), _i64(seq_lens), _i64(q_starts)
    call = abi.Attention(
        dtype=_DTYPES[q.dtype],
        batch=index.numel(),
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        tokens=tokens,
        q=q.data_ptr(),
        q_token=q.stride(0),
        q_head=q.stride(1),
        k_pool=k_pool.data_ptr(),
        v_pool=v_pool.data_ptr(),
        k_slot=k_pool.stride(0),
        k_head=k_pool.stride(1),
        v_slot=v_pool.stride(0),
        v_head=v_pool.stride(1),
        req_to_token=req_to_token.data_ptr(),
        req_stride=req_to_token.stride(0),
        req_index=index.data_ptr(),
        seq_lens=lens.data_ptr(),
        q_starts=starts.data_ptr(),
        out=out.data_ptr(),
        out_token=out.stride(0),
        out_head=out.stride(1),
        scale=scale,
        logit_cap=logit_cap,
        window=window,
        causal=int(causal),
    )
    if k_new is not None and v_new is not None and out_cache_loc is not None:
        _dense_last(k_new, "attention: k_new")
        _dense_last(v_new, "attention: v_new")
        if k_new.dtype != q.dtype or v_new.dtype != q.dtype:
            raise ValueError(f"attention: k_new and v_new must be {q.dtype} like q.")
        loc = _i64(out_cache_loc)
        call.k_new, call.v_new, call.out_loc = k_new.data_ptr(), v_new.data_ptr(), loc.data_ptr()
        call.kn_token, call.kn_head = k_new.stride(0), k_new.stride(1)
        call.vn_token, call.vn_head = v_new.stride(0), v_new.stride(1)
    if mask is not None:
        if mask.dtype not in (torch.bool, torch.uint8) or mask_offsets is None:
            raise ValueError("attention: a mask is bool and comes with mask_offsets.")
        mask = mask.contiguous()
        offsets = _i64(mask_offsets)
        call.mask, call.mask_offsets = mask.data_ptr(), offsets.data_ptr()
    library().sg_attention(call)
    return out


@dataclass(frozen=True)
class Packed:
    """A weight [cols, inner] in the kernels' layout."""

    data: torch.Tensor
    """uint8, the packed words, or bytes where there is a scale."""
    cols: int
    inner: int
    dtype: torch.dtype
    """Of the weight before it was packed, and of what it is multiplied with."""
    gated: bool
    """Gate and up columns interleaved, for `linear(..., act=)`."""
    scale: torch.Tensor | None = None
    """float32, one a packed column: the weight is int8."""


def pack(weight: torch.Tensor, gated: bool = False, int8: bool = False) -> Packed:
    """Pack a weight [cols, inner] once for `linear`.

    Args:
      gated: the rows are gate, then as many up; `linear` then returns act(gate) * up.
      int8: round it to int8, symmetric, with one scale for each column of the product. Half the
        memory to read of bfloat16; no longer exact.
    Raises:
      ValueError: a dtype or size that the kernels do not take.
    """
    cols, inner = weight.shape
    if not supports(weight.dtype, inner) or (gated and cols % 32):
        raise ValueError(
            f"pack: bfloat16 (even inner size) or float32 expected, columns a multiple of 32 if "
            f"gated; got {weight.dtype} {[cols, inner]}, gated {gated}."
        )
    lib, scale = library(), None
    if int8:
        size = lib.sg_packed_int8_bytes(cols, inner)
        scale = torch.empty(-(-cols // 32) * 32)
    else:
        size = lib.sg_packed_bytes(_DTYPES[weight.dtype], cols, inner)
    packed = Packed(_arena.take(size), cols, inner, weight.dtype, gated, scale)
    repack(packed, weight)
    return packed


def repack(packed: Packed, weight: torch.Tensor) -> None:
    """Fill `packed` again from a weight of the same shape and dtype (a weight update)."""
    if (*weight.shape, weight.dtype) != (packed.cols, packed.inner, packed.dtype):
        raise ValueError(
            f"repack: {weight.dtype} {list(weight.shape)} into {packed.dtype} "
            f"{[packed.cols, packed.inner]}."
        )
    weight = _dense_last(weight, "pack: weight")
    arguments = (
        _DTYPES[packed.dtype],
        weight.data_ptr(),
        weight.stride(0),
        packed.cols,
        packed.inner,
        int(packed.gated),
        packed.data.data_ptr(),
    )
    if packed.scale is None:
        library().sg_pack(*arguments)
    else:
        library().sg_pack_int8(*arguments, packed.scale.data_ptr())


_PAGE = 2 << 20
_CHUNK = 32 << 20
_MADV_HUGEPAGE = 14


def use_large_pages(memory: torch.Tensor) -> None:
    """Ask the system to back `memory` with large pages; where it has none, nothing happens.

    Streaming a weight then misses the TLB some hundred times less. Pages that exist already are
    left for the kernel to put together when it finds the time.
    """
    start = memory.data_ptr()
    end = start + memory.untyped_storage().nbytes() - memory.storage_offset() * memory.itemsize
    first, last = -(-start // _PAGE) * _PAGE, end // _PAGE * _PAGE
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None and last > first:
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_HUGEPAGE)


class _Arena:
    """Memory for packed weights, cut from chunks of large pages: most weights are less than one."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, size: int) -> torch.Tensor:
        size = -(-size // 64) * 64
        if self._used + size > self._chunk.numel():
            raw = torch.empty(max(size, _CHUNK) + _PAGE, dtype=torch.uint8)
            self._chunk = raw[-raw.data_ptr() % _PAGE :]
            self._used = 0
            use_large_pages(self._chunk)
        self._used += size
        return self._chunk[self._used - size : self._used]


_arena = _Arena()


def linear(
    x: torch.Tensor,
    packed: Packed,
    bias: torch.Tensor | None = None,
    *,
    act: str = "silu",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x [..., inner] @ weight.T + bias, or act(gate) * up for a gated weight.

    Args:
      bias: [cols] in the weight's dtype; for a gated weight interleaved as the weight is.
      act: `silu`, `gelu_tanh` or `gelu`; gated weights only.
      out_dtype: float32 to keep full precision; the weight's dtype by default.
    """
    lead = x.shape[:-1]
    x = x.reshape(-1, x.shape[-1])
    if x.shape[1] != packed.inner or x.dtype != packed.dtype:
        raise ValueError(
            f"linear: x {x.dtype} {list(x.shape)} does not fit {packed.dtype} "
            f"{[packed.cols, packed.inner]}."
        )
    _dense_last(x, "linear: x")
    width = packed.cols // 2 if packed.gated else packed.cols
    out = torch.empty((x.shape[0], width), dtype=out_dtype or packed.dtype)
    call = abi.Linear(
        dtype=_DTYPES[packed.dtype],
        rows=x.shape[0],
        cols=packed.cols,
        inner=packed.inner,
        x=x.data_ptr(),
        x_row=x.stride(0),
        weight=packed.data.data_ptr(),
        scale=0 if packed.scale is None else packed.scale.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        epilogue=abi.GATED if packed.gated else abi.STORE,
        act=ACTIVATIONS[act],
        out=out.data_ptr(),
        out_row=out.stride(0),
        out_f32=int(out.dtype == torch.float32),
    )
    library().sg_linear(call)
    return out.reshape(*lead, width)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    weight_offset: float = 0.0,
) -> torch.Tensor:
    """x / rms(x) * (weight + weight_offset), rows [..., n]; with a residual, of x + residual, which
    is written back to `residual`."""
    flat = _dense_last(x, "rms_norm: x").reshape(-1, x.shape[-1])
    out = torch.empty_like(flat, memory_format=torch.contiguous_format)
    call = abi.Norm(
        dtype=_DTYPES[x.dtype],
        rows=flat.shape[0],
        cols=flat.shape[1],
        x=flat.data_ptr(),
        x_row=flat.stride(0),
        weight=weight.data_ptr(),
        eps=eps,
        weight_offset=weight_offset,
        out=out.data_ptr(),
        out_row=out.stride(0),
    )
    if residual is not None:
        rest = residual.view(flat.shape)
        call.residual, call.residual_row = rest.data_ptr(), rest.stride(0)
    library().sg_norm(call)
    return out.reshape(x.shape)


def rope(
    positions: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor | None,
    cache: torch.Tensor,
    head_dim: int,
    neox: bool = True,
) -> None:
    """Rotate q [tokens, q_heads * head_dim] and k likewise, in place.

    Args:
      positions: [tokens].
      cache: [positions, rotary_dim], cosines then sines, float32 or q's dtype.
    """
    positions = _i64(positions)
    call = abi.Rope(
        dtype=_DTYPES[q.dtype],
        tokens=q.shape[0],
        q_heads=q.shape[1] // head_dim,
        k_heads=0 if k is None else k.shape[1] // head_dim,
        head_dim=head_dim,
        rotary_dim=cache.shape[-1],
        neox=int(neox),
        positions=positions.data_ptr(),
        cache=cache.data_ptr(),
        cache_f32=int(cache.dtype == torch.float32),
        cache_row=cache.stride(0),
        q=_dense_last(q, "rope: q").data_ptr(),
        k=0 if k is None else _dense_last(k, "rope: k").data_ptr(),
        q_token=q.stride(0),
        q_head=head_dim,
        k_token=0 if k is None else k.stride(0),
        k_head=head_dim,
    )
    library().sg_rope(call)


def gated(x: torch.Tensor, act: str = "silu") -> torch.Tensor:
    """act(first half of the last dimension) * second half."""
    flat = _dense_last(x, "gated: x").reshape(-1, x.shape[-1])
    width = x.shape[-1] // 2
    out = torch.empty((flat.shape[0], width), dtype=x.dtype)
    call = abi.Gated(
        dtype=_DTYPES[x.dtype],
        rows=flat.shape[0],
        cols=width,
        x=flat.data_ptr(),
        x_row=flat.stride(0),
        out=out.data_ptr(),
        out_row=out.stride(0),
        act=ACTIVATIONS[act],
    )
    library().sg_gated(call)
    return out.reshape(*x.shape[:-1], width)

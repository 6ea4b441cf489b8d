"""csrc/abi.h in ctypes: the structs that carry a call, and the library's functions.

`declare` compares sizes with the compiled library, so that a field added on one side only is
noticed at load and not in a crash.
"""

from __future__ import annotations

import ctypes
from ctypes import (
    POINTER,
    Structure,
    c_char_p,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_void_p,
)

F32, BF16 = 0, 1
STORE, GATED, ADD = 0, 1, 2
SILU, GELU_TANH, GELU = 0, 1, 2
PARTS = ("embeddings, final norm", "qkv", "rotate, write KV", "attention", "o", "gate, up", "down")
"""Of a decoder's time, in the order of its clock."""


def _fields(spec: str) -> list[tuple[str, type]]:
    """`"i32 a b; ptr c"` as ctypes fields."""
    kinds = {"i32": c_int32, "i64": c_int64, "f32": c_float, "ptr": c_void_p}
    fields = []
    for group in spec.replace("\n", " ").split(";"):
        if words := group.split():
            fields += [(name, kinds[words[0]]) for name in words[1:]]
    return fields


class Attention(Structure):
    """One attention call; shapes in abi.h."""

    _fields_ = _fields(
        """i32 dtype batch q_heads kv_heads head_dim tokens; ptr q; i64 q_token q_head;
        ptr k_new v_new; i64 kn_token kn_head vn_token vn_head; ptr out_loc k_pool v_pool;
        i64 k_slot k_head v_slot v_head; ptr req_to_token; i64 req_stride;
        ptr req_index seq_lens q_starts out; i64 out_token out_head; f32 scale logit_cap;
        i64 window; i32 causal; ptr mask mask_offsets"""
    )


class Linear(Structure):
    """One product with a packed weight."""

    _fields_ = _fields(
        """i32 dtype rows cols inner; ptr x; i64 x_row; i32 x_f32; ptr norm; f32 norm_eps;
        ptr weight scale bias; i32 epilogue act; ptr out; i64 out_row; i32 out_f32"""
    )


class Norm(Structure):
    """RMSNorm of rows, with an optional residual."""

    _fields_ = _fields(
        """i32 dtype rows cols; ptr x; i64 x_row; ptr residual; i64 residual_row; ptr weight;
        f32 eps weight_offset; ptr out; i64 out_row"""
    )


class Rope(Structure):
    """Rotary embedding of q and k in place."""

    _fields_ = _fields(
        """i32 dtype tokens q_heads k_heads head_dim rotary_dim neox; ptr positions cache;
        i32 cache_f32; i64 cache_row; ptr q k; i64 q_token q_head k_token k_head"""
    )


class Gated(Structure):
    """act(first half) * second half, by rows."""

    _fields_ = _fields("i32 dtype rows cols; ptr x; i64 x_row; ptr out; i64 out_row; i32 act")


class Sample(Structure):
    """One token a row."""

    _fields_ = _fields(
        "i32 rows vocab; ptr probs; i64 row_stride; ptr top_p min_p top_k uniform seed position out"
    )


class Layer(Structure):
    """One decoder layer's weights and pools."""

    _fields_ = _fields(
        """ptr input_norm post_norm qkv qkv_bias o o_bias gate_up gate_up_bias down down_bias
        qkv_scale o_scale gate_up_scale down_scale q_norm k_norm attn_out_norm mlp_out_norm
        k_pool v_pool; i64 k_slot k_head v_slot v_head; ptr rope_cache; i32 rope_cache_f32;
        i64 rope_row; f32 scale logit_cap; i64 window"""
    )


class Decoder(Structure):
    """All layers over one batch."""

    _fields_ = _fields(
        """i32 dtype layers hidden inter q_heads kv_heads head_dim rotary_dim neox act; f32 eps;
        ptr layer final_norm; i32 tokens batch; ptr embeds; i64 embeds_row;
        ptr positions out_loc req_to_token; i64 req_stride; ptr req_index seq_lens q_starts mask
        mask_offsets out; i64 out_row; ptr clock"""
    )


_STRUCTS = (Attention, Linear, Norm, Rope, Gated, Sample, Layer, Decoder)


def declare(lib: ctypes.CDLL) -> None:
    """Give the library's functions their types.

    Raises:
      OSError: the library was compiled from other sources than this package's.
    """
    lib.sg_abi.restype = c_int64
    sizes = [lib.sg_abi(i) for i in range(len(_STRUCTS))]
    expected = [ctypes.sizeof(struct) for struct in _STRUCTS]
    if sizes != expected:
        raise OSError(
            f"The CPU kernels were built for other structs: sizes {sizes}, expected {expected}. "
            "Remove the cached library and start again."
        )
    lib.sg_select.argtypes, lib.sg_select.restype = [c_char_p], c_char_p
    for name, struct in (
        ("sg_attention", Attention),
        ("sg_linear", Linear),
        ("sg_norm", Norm),
        ("sg_rope", Rope),
        ("sg_gated", Gated),
        ("sg_sample", Sample),
        ("sg_decoder", Decoder),
    ):
        function = getattr(lib, name)
        function.argtypes, function.restype = [POINTER(struct)], None
    lib.sg_packed_bytes.argtypes, lib.sg_packed_bytes.restype = [c_int, c_int, c_int], c_int64
    lib.sg_pack.argtypes = [c_int, c_void_p, c_int64, c_int, c_int, c_int, c_void_p]
    lib.sg_pack.restype = None
    lib.sg_packed_int8_bytes.argtypes, lib.sg_packed_int8_bytes.restype = [c_int, c_int], c_int64
    lib.sg_pack_int8.argtypes = [*lib.sg_pack.argtypes, c_void_p]
    lib.sg_pack_int8.restype = None

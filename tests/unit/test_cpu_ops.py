"""Linear layers, norms, rotary embedding and gated activations against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from stateful_sglang.cpu import ops

pytestmark = pytest.mark.usefixtures("kernel_path")

dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Within the output's rounding, relative to the largest value."""
    assert got.shape == want.shape
    assert not got.isnan().any()
    if got.numel():
        limit = 2e-6 if got.dtype == torch.float32 else 5e-3
        assert ((got.double() - want).abs().max() / (want.abs().max() + 1e-9)).item() < limit


def rand(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=gen) * scale).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.one_of(st.integers(0, 30), st.sampled_from([97, 250])),
    cols=st.integers(1, 140),
    inner=st.integers(1, 100).map(lambda n: 2 * n),
    dtype=dtypes,
    bias=st.booleans(),
    wide=st.booleans(),
    f32=st.booleans(),
)
def test_linear(rows, cols, inner, dtype, bias, wide, f32):
    weight = rand(cols, inner, dtype=dtype, seed=1)
    x = rand(rows, 2 * inner if wide else inner, dtype=dtype, seed=2)[:, :inner]
    b = rand(cols, dtype=dtype, seed=3) if bias else None
    got = ops.linear(x, ops.pack(weight), b, out_dtype=torch.float32 if f32 else None)
    want = x.double() @ weight.double().T + (b.double() if bias else 0.0)
    close(got, want)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 30),
    half=st.integers(1, 6).map(lambda n: 16 * n),
    dtype=dtypes,
    act=st.sampled_from(["silu", "gelu", "gelu_tanh"]),
)
def test_gated_linear_and_gated(rows, half, dtype, act):
    inner = 64
    weight = rand(2 * half, inner, dtype=dtype, seed=1, scale=inner**-0.5)
    x = rand(rows, inner, dtype=dtype, seed=2)
    apply = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda g: functional.gelu(g, approximate="tanh"),
    }[act]
    gate, up = (x.double() @ weight.double().T).chunk(2, -1)
    close(ops.linear(x, ops.pack(weight, gated=True), act=act), apply(gate) * up)
    both = rand(rows, 2 * half + 6, dtype=dtype, seed=4)[:, : 2 * (half - 1)]
    gate, up = both.double().chunk(2, -1)
    close(ops.gated(both, act), apply(gate) * up)


def on_int8_grid(cols: int, inner: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A weight that rounding to int8 leaves as it is: integers over 64, 127 among each column's."""
    gen = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (cols, inner), generator=gen)
    weight[torch.arange(cols), torch.randint(0, inner, (cols,), generator=gen)] = 127
    return (weight / 64).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.one_of(st.integers(0, 30), st.sampled_from([97, 250])),
    cols=st.integers(1, 140),
    inner=st.integers(1, 100).map(lambda n: 2 * n),
    dtype=dtypes,
    bias=st.booleans(),
    f32=st.booleans(),
)
def test_int8_linear(rows, cols, inner, dtype, bias, f32):
    weight = on_int8_grid(cols, inner, dtype, seed=1)
    weight[cols // 2] = 0
    x = rand(rows, inner, dtype=dtype, seed=2)
    b = rand(cols, dtype=dtype, seed=3) if bias else None
    packed = ops.pack(weight, int8=True)
    got = ops.linear(x, packed, b, out_dtype=torch.float32 if f32 else None)
    close(got, x.double() @ weight.double().T + (b.double() if bias else 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_int8_gated_layer_and_its_bits_in_any_company(dtype):
    weight = on_int8_grid(192, 128, dtype, seed=1)
    packed = ops.pack(weight, gated=True, int8=True)
    x = rand(300, 128, dtype=dtype, seed=2, scale=0.1)
    together = ops.linear(x, packed)
    gate, up = (x.double() @ weight.double().T).chunk(2, -1)
    close(together, functional.silu(gate) * up)
    for n in (1, 2, 3, 5, 6, 7, 12, 13, 241):
        assert torch.equal(ops.linear(x[7 : 7 + n], packed), together[7 : 7 + n])


def test_rounding_to_int8_errs_by_half_a_step_at_most():
    weight = rand(70, 64, dtype=torch.float32, seed=1)
    step = weight.abs().amax(1) / 127
    rounded = ops.linear(torch.eye(64), ops.pack(weight, int8=True)).T
    assert ((rounded - weight).abs() <= 0.5001 * step[:, None]).all()


@pytest.mark.parametrize("int8", [False, True])
def test_repacking_follows_the_weight(int8):
    first, second = (rand(70, 64, dtype=torch.bfloat16, seed=s) for s in (1, 2))
    x = rand(3, 64, dtype=torch.bfloat16, seed=3)
    packed = ops.pack(first, int8=int8)
    ops.repack(packed, second)
    assert torch.equal(ops.linear(x, packed), ops.linear(x, ops.pack(second, int8=int8)))
    with pytest.raises(ValueError, match="repack"):
        ops.repack(packed, second[:5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_company(dtype):
    packed = ops.pack(rand(300, 128, dtype=dtype, seed=1))
    x = rand(500, 128, dtype=dtype, seed=2)
    together = ops.linear(x, packed)
    for n in (1, 2, 5, 11, 12, 13, 30, 241):
        assert torch.equal(ops.linear(x[7 : 7 + n], packed), together[7 : 7 + n])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9),
    n=st.integers(1, 70),
    dtype=dtypes,
    residual=st.booleans(),
    offset=st.sampled_from([0.0, 1.0]),
)
def test_rms_norm(rows, n, dtype, residual, offset):
    x, weight = rand(rows, n + 3, dtype=dtype, seed=1)[:, :n], rand(n, dtype=dtype, seed=2)
    rest = rand(rows, n, dtype=dtype, seed=3) if residual else None
    total = x.double() + (rest.double() if residual else 0.0)
    got = ops.rms_norm(x, weight, 1e-5, rest, offset)
    if residual:
        close(rest, total)
        total = rest.double()  # what is normed is the residual as it was rounded
    want = total / (total.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * (weight.double() + offset)
    close(got, want)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 9),
    dim=st.sampled_from([16, 34, 64, 80]),
    partial=st.booleans(),
    neox=st.booleans(),
    dtype=dtypes,
    f32_cache=st.booleans(),
    with_k=st.booleans(),
)
def test_rope(tokens, dim, partial, neox, dtype, f32_cache, with_k):
    rotary = dim // 4 * 2 if partial else dim
    cache = rand(50, rotary, dtype=torch.float32 if f32_cache else dtype, seed=1)
    wide = rand(tokens, 5 * dim, dtype=dtype, seed=2)
    q, k = wide[:, : 3 * dim], wide[:, 3 * dim :] if with_k else None
    positions = torch.randint(0, 50, (tokens,), generator=torch.Generator().manual_seed(3))
    want = wide.double().view(tokens, 5, dim).clone()
    cos, sin = cache[positions].double()[:, None].chunk(2, -1)
    rot = want[..., :rotary].clone()
    if neox:
        a, b = rot.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    else:
        a, b = rot[..., ::2], rot[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    heads = 5 if with_k else 3
    want[:, :heads, :rotary] = turned[:, :heads]
    ops.rope(positions, q, k, cache, dim, neox)
    close(wide, want.view(tokens, 5 * dim))


def test_misfits_are_refused():
    packed = ops.pack(torch.zeros(8, 16))
    with pytest.raises(ValueError, match="linear"):
        ops.linear(torch.zeros(2, 15), packed)
    with pytest.raises(ValueError, match="pack"):
        ops.pack(torch.zeros(8, 15, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="multiple of 32"):
        ops.pack(torch.zeros(48, 16), gated=True)

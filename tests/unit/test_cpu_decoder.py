"""The decoder stack against the same model in float64, feature by feature."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from stateful_sglang.cpu import ops
from stateful_sglang.cpu.plan import plan_step

pytestmark = pytest.mark.usefixtures("kernel_path")

HIDDEN, INTER, LAYERS = 96, 160, 3
SLOTS = 600


def rms(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def on_int8_grid(weight):
    """The weight rounded to int8 with a power of two for each column's step."""
    step = 2.0 ** (weight.float().abs().amax(1, keepdim=True) / 127).log2().ceil()
    rounded = (weight.float() / step).round()
    rounded[:, 0] = 127
    return (rounded * step).to(weight.dtype)


class Tiny:
    """A random dense model and its reference in float64."""

    def __init__(
        self,
        dtype,
        heads=(6, 2),
        dim=32,
        act="silu",
        sandwich=False,
        qk_norm=False,
        bias=False,
        cap=0.0,
        window=-1,
        neox=True,
        rotary=None,
        int8=False,
        seed=0,
    ):
        gen = torch.Generator().manual_seed(seed)
        self.dtype, self.heads, self.dim, self.act = dtype, heads, dim, act
        self.cap, self.window, self.neox = cap, window, neox
        self.rotary, self.eps = rotary or dim, 1e-5
        self.int8 = int8

        def rand(*shape, scale=1.0):
            return (torch.randn(shape, generator=gen) * scale).to(dtype)

        def norm(n):
            return 1 + 0.2 * torch.randn(n, generator=gen)

        q_heads, kv_heads = heads
        self.weights = []
        for _ in range(LAYERS):
            w = {
                "qkv": rand((q_heads + 2 * kv_heads) * dim, HIDDEN, scale=HIDDEN**-0.5),
                "o": rand(HIDDEN, q_heads * dim, scale=(q_heads * dim) ** -0.5),
                "gate_up": rand(2 * INTER, HIDDEN, scale=HIDDEN**-0.5),
                "down": rand(HIDDEN, INTER, scale=INTER**-0.5),
                "input_norm": norm(HIDDEN),
                "post_norm": norm(HIDDEN),
            }
            if bias:
                w["qkv_bias"] = rand(w["qkv"].shape[0], scale=0.3)
                w["o_bias"], w["down_bias"] = rand(HIDDEN, scale=0.3), rand(HIDDEN, scale=0.3)
            if qk_norm:
                w["q_norm"], w["k_norm"] = norm(dim), norm(dim)
            if sandwich:
                w["attn_out_norm"], w["mlp_out_norm"] = norm(HIDDEN), norm(HIDDEN)
            if int8:  # Weights that rounding leaves as they are.
                w |= {name: on_int8_grid(w[name]) for name in ("qkv", "o", "gate_up", "down")}
            self.weights.append(w)
        self.final = norm(HIDDEN)
        angles = torch.arange(900)[:, None] * 10000 ** (
            -torch.arange(0, self.rotary, 2) / self.rotary
        )
        self.rope = torch.cat([angles.cos(), angles.sin()], 1).float().contiguous()
        self.stack = self.build()
        self.pools = [
            (
                torch.full((SLOTS, kv_heads, dim), float("nan"), dtype=dtype),
                torch.full((SLOTS, kv_heads, dim), float("nan"), dtype=dtype),
            )
            for _ in range(LAYERS)
        ]
        self.stack.bind_pools(self.pools)

    def build(self):
        from stateful_sglang.cpu.decoder import DecoderLayer, DecoderShape, DecoderStack

        shape = DecoderShape(
            HIDDEN, INTER, *self.heads, self.dim, self.rotary, self.neox, self.act, self.eps
        )
        packed = ("qkv", "o", "gate_up", "down")
        layers = [
            DecoderLayer(
                **{k: ops.pack(w[k], k == "gate_up", self.int8) for k in packed},
                **{k: v for k, v in w.items() if k not in packed},
                rope_cache=self.rope,
                scale=self.dim**-0.5,
                logit_cap=self.cap,
                window=self.window,
            )
            for w in self.weights
        ]
        return DecoderStack(shape, layers, self.final, self.dtype)

    def rotate(self, x, positions):
        half = self.rotary // 2
        table = self.rope[positions].double()[:, None]
        cos, sin = table[..., :half], table[..., half:]
        rot, rest = x[..., : self.rotary], x[..., self.rotary :]
        if self.neox:
            a, b = rot[..., :half], rot[..., half:]
            out = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        else:
            a, b = rot[..., ::2], rot[..., 1::2]
            out = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        return torch.cat([out, rest], -1)

    def reference(self, x):
        """Hidden states of one whole sequence x [n, HIDDEN], in float64."""
        x = x.double()
        n = x.shape[0]
        (hq, hk), d = self.heads, self.dim
        positions = torch.arange(n)
        gap = positions[:, None] - positions[None]
        allowed = (gap >= 0) & ((gap <= self.window) if self.window >= 0 else True)
        for f32 in self.weights:
            w = {k: v.double() for k, v in f32.items()}
            y = rms(x, w["input_norm"], self.eps) @ w["qkv"].T + w.get("qkv_bias", 0.0)
            q, k, v = y.view(n, -1, d).split([hq, hk, hk], 1)
            if "q_norm" in w:
                q, k = rms(q, w["q_norm"], self.eps), rms(k, w["k_norm"], self.eps)
            q, k = self.rotate(q, positions), self.rotate(k, positions)
            k, v = k.repeat_interleave(hq // hk, 1), v.repeat_interleave(hq // hk, 1)
            s = torch.einsum("qhd,khd->hqk", q, k) * d**-0.5
            if self.cap:
                s = self.cap * torch.tanh(s / self.cap)
            p = s.masked_fill(~allowed, float("-inf")).softmax(-1)
            y = torch.einsum("hqk,khd->qhd", p, v).reshape(n, -1) @ w["o"].T + w.get("o_bias", 0.0)
            x = x + (rms(y, w["attn_out_norm"], self.eps) if "attn_out_norm" in w else y)
            y = rms(x, w["post_norm"], self.eps) @ w["gate_up"].T
            gate, up = y.chunk(2, -1)
            gate = {
                "silu": functional.silu,
                "gelu": functional.gelu,
                "gelu_tanh": lambda g: functional.gelu(g, approximate="tanh"),
            }[self.act](gate)
            y = (gate * up) @ w["down"].T + w.get("down_bias", 0.0)
            x = x + (rms(y, w["mlp_out_norm"], self.eps) if "mlp_out_norm" in w else y)
        return rms(x, self.final.double(), self.eps)


def run_in_pieces(model, sequences, pieces):
    """Each sequence, `pieces` tokens of every one at a time, on shuffled slots."""
    table = torch.full((len(sequences) + 1, 300), -1, dtype=torch.int32)
    free = iter(torch.randperm(SLOTS, generator=torch.Generator().manual_seed(1)).tolist())
    done = [0] * len(sequences)
    outs = [[] for _ in sequences]
    for piece in itertools.cycle(pieces):
        if all(d == len(s) for d, s in zip(done, sequences, strict=True)):
            return [torch.cat(o) for o in outs]
        new = [min(piece, len(s) - d) for d, s in zip(done, sequences, strict=True)]
        loc, positions, parts = [], [], []
        for i, n in enumerate(new):
            slots = [next(free) for _ in range(n)]
            table[i + 1, done[i] : done[i] + n] = torch.tensor(slots, dtype=torch.int32)
            loc += slots
            positions += range(done[i], done[i] + n)
            parts.append(sequences[i][done[i] : done[i] + n])
        done = [d + n for d, n in zip(done, new, strict=True)]
        plan = plan_step(table, torch.arange(len(sequences)) + 1, new, done)
        out = model.stack.run(torch.cat(parts), torch.tensor(positions), torch.tensor(loc), plan)
        for o, part in zip(outs, out.split(new), strict=True):
            o.append(part)
    return []


FEATURES = [
    {},
    {"bias": True, "heads": (7, 1)},
    {"qk_norm": True, "dim": 16},
    {"sandwich": True, "act": "gelu_tanh", "cap": 1.5, "window": 40},
    {"act": "gelu", "neox": False, "rotary": 16},
    {"int8": True, "bias": True},
]


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stack_matches_float64(features, dtype):
    model = Tiny(dtype, **features)
    gen = torch.Generator().manual_seed(3)
    sequences = [torch.randn((n, HIDDEN), generator=gen).to(dtype) for n in (150, 1, 37)]
    got = run_in_pieces(model, sequences, [64, 1, 7])
    for sequence, out in zip(sequences, got, strict=True):
        want = model.reference(sequence)
        error = ((out.double() - want).norm() / want.norm()).item()
        assert error < (2e-6 if dtype == torch.float32 else 1.5e-2), error


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_same_bits_however_it_came(dtype, int8):
    model = Tiny(dtype, int8=int8)
    gen = torch.Generator().manual_seed(4)
    sequences = [torch.randn((n, HIDDEN), generator=gen).to(dtype) for n in (140, 33)]
    at_once = run_in_pieces(model, sequences, [500])
    for pieces in ([1], [8], [3, 1, 50]):
        for a, b in zip(at_once, run_in_pieces(model, sequences, pieces), strict=True):
            assert torch.equal(a, b)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = run_in_pieces(model, sequences[:1], [64])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone[0], at_once[0])


def test_no_tokens():
    model = Tiny(torch.float32)
    empty = torch.empty(0, dtype=torch.int64)
    plan = plan_step(torch.zeros((1, 4), dtype=torch.int32), empty, [], [])
    assert model.stack.run(torch.empty(0, HIDDEN), empty, empty, plan).shape == (0, HIDDEN)


def test_counts_that_differ_are_refused():
    model = Tiny(torch.float32)
    plan = plan_step(torch.zeros((1, 4), dtype=torch.int32), torch.tensor([0]), [2], [2])
    with pytest.raises(ValueError, match="differ"):
        model.stack.run(torch.zeros(2, HIDDEN), torch.arange(2), torch.arange(3), plan)

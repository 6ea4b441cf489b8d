"""The row sampler draws from exactly the tokens that sorting would leave, in proportion."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from stateful_sglang.cpu import extension
from stateful_sglang.cpu.platform import prepare
from stateful_sglang.cpu.sampling import around_filtered_sample, around_sample, sample

pytestmark = pytest.mark.skipif(extension.load() is None, reason="no C++ compiler")


def filtered(probs: torch.Tensor, k: int, p: float, min_p: float) -> torch.Tensor:
    """Probabilities after the filters, by a stable sort; float64."""
    probs = probs.double()
    values, order = probs.sort(descending=True, stable=True)
    before = values.cumsum(0) - values
    keep = (torch.arange(len(probs)) < (k if 0 < k < len(probs) else len(probs))) & (before <= p)
    keep &= values >= values[0] * min_p
    out = torch.zeros_like(probs)
    out[order[keep]] = values[keep]
    return out / out.sum()


def rows(n: int, vocab: int, seed: int, sharp: float) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn((n, vocab), generator=gen) * sharp, -1)


@settings(max_examples=80, deadline=None)
@given(
    vocab=st.sampled_from([1, 2, 17, 300, 5000]),
    k=st.sampled_from([0, 1, 2, 40, 10**9]),
    # Odd values: equal probabilities must not add up to exactly p, where rounding decides.
    p=st.sampled_from([1.0, 0.95137, 0.50331, 0.01013]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 1.0]),
    sharp=st.sampled_from([0.0, 0.3, 3.0, 20.0]),
    seed=st.integers(0, 50),
)
def test_the_inverse_of_the_filtered_mass(vocab, k, p, min_p, sharp, seed):
    probs = rows(1, vocab, seed, sharp)
    want = filtered(probs[0], k, p, min_p)
    u = torch.linspace(0, 1, 66, dtype=torch.float64)[:-1] + 0.003
    got = sample(
        probs.expand(len(u), -1),
        top_ks=torch.full((len(u),), k),
        top_ps=torch.full((len(u),), p),
        min_ps=torch.full((len(u),), min_p),
        uniform=u,
    )
    mass = want.cumsum(0)
    for value, token in zip(u, got, strict=True):
        # Sums differ in the last bits between the two, so a boundary may fall either way.
        low = mass[token] - want[token]
        assert low - 2e-6 <= value <= mass[token] + 2e-6
        assert want[token] > 0 or abs(float(low - value)) < 2e-6


def test_keyed_noise_has_the_law_and_repeats():
    probs = rows(1, 30, 7, 1.0)
    n = 40_000
    seeds, positions = torch.full((n,), 11), torch.arange(n)
    got = sample(
        probs.expand(n, -1), top_ps=torch.full((n,), 0.9), seeds=seeds, positions=positions
    )
    want = filtered(probs[0], 0, 0.9, 0.0)
    counts = torch.bincount(got, minlength=30)
    assert counts[want == 0].sum() == 0
    kept = want > 0
    assert chisquare(counts[kept].numpy(), (want[kept] * n).numpy()).pvalue > 1e-3
    again = sample(probs.expand(5, -1), seeds=seeds[:5], positions=positions[90:95])
    alone = sample(probs, seeds=seeds[:1], positions=positions[92:93])
    assert again[2] == alone[0]


def test_zero_mass_is_never_drawn():
    probs = torch.zeros(64, 100)
    probs[:, 37] = 1e-30
    got = sample(probs, uniform=torch.linspace(0, 0.999999, 64, dtype=torch.float64))
    assert (got == 37).all()


def test_noise_and_shapes_are_checked():
    with pytest.raises(ValueError, match="uniform or both"):
        sample(torch.ones(1, 4))
    with pytest.raises(ValueError, match="float32"):
        sample(torch.ones(1, 4).double(), uniform=torch.zeros(1))
    with pytest.raises(ValueError, match="rows"):
        sample(torch.ones(2, 4), uniform=torch.zeros(1))


@pytest.mark.parametrize(
    ("hook", "target"),
    [
        (around_sample, "sampling_from_probs_torch"),
        (around_filtered_sample, "top_k_top_p_min_p_sampling_from_probs_torch"),
    ],
)
def test_a_hook_takes_every_argument_of_what_it_stands_before(hook, target):
    prepare()
    from sglang.srt.layers import sampler

    theirs = inspect.signature(getattr(sampler, target)).parameters
    ours = inspect.signature(hook).parameters
    assert list(ours)[1:] == list(theirs)


def test_a_bound_on_top_k_reaches_sglangs_sampler_where_it_samples():
    asked = []
    arguments = (rows(1, 9, 1, 1.0), None, None, None, False, torch.tensor([5]), None)
    around_filtered_sample(lambda *_, **named: asked.append(named), *arguments, max_top_k=4)
    assert asked == [{"return_filtered_probs": False, "max_top_k": 4}]


def test_no_rows():
    assert sample(torch.empty(0, 8), uniform=torch.empty(0)).shape == (0,)

"""Smooth transitions (the paper's figure 3): the mixture's draws, and one program for all gammas."""

import numpy as np
import pytest
import tiny

from plastic_jax.data import sampler
from plastic_jax.errors import InputError
from plastic_jax.study import plan

# Smooth transitions (the paper's figure 3).


def test_a_smooth_transition_draws_with_the_papers_probability():
    """p(n) at the places that paper.md names, and the drawn share of examples from outside the prefix."""
    steps = 500
    for gamma, half, most in ((0.1, 3, 20), (0.5, 10, 66), (0.9, 66, 437)):
        p = [
            float(sampler.transition_probability(np.float32(gamma), np.int32(n), np.int32(steps))) for n in range(steps)
        ]
        assert min(n for n in range(steps) if p[n] >= 0.5) in (half, half + 1)
        assert min(n for n in range(steps) if p[n] >= 0.99) in (most, most + 1)
    n, prefix = 40, 10
    permutation = np.random.default_rng(1).permutation(n).astype(np.int32)
    for probability in (0.0, 0.3, 1.0):
        drawn = np.concatenate(
            [
                sampler.mixture(np.uint32(2), np.int32(0), np.int32(s), permutation, np.int32(prefix), probability, 500)
                for s in range(20)
            ]
        )
        counts = np.bincount(drawn, minlength=n)
        outside = np.setdiff1d(np.arange(n), permutation[:prefix])
        expected = np.full(n, probability / n)
        expected[permutation[:prefix]] += (1 - probability) / prefix
        spread = np.sqrt(len(drawn) * expected * (1 - expected))
        assert (np.abs(counts - len(drawn) * expected) <= 5 * spread).all()
        assert probability > 0 or counts[outside].sum() == 0


def test_the_fresh_arm_of_a_smooth_transition_shares_its_draws_from_the_whole():
    """With gamma = 0 every example comes from the whole train set, from the first step on."""
    zero = sampler.transition_probability(np.float32(0), np.int32(0), np.int32(10))
    assert float(zero) == 1
    draw = lambda p, prefix: np.asarray(  # noqa: E731
        sampler.mixture(np.uint32(2), np.int32(0), np.int32(7), np.arange(40, dtype=np.int32), np.int32(prefix), p, 64)
    )
    fresh, mixed = draw(1.0, 40), draw(0.5, 10)
    assert (mixed == fresh).sum() > 16 and (mixed[mixed != fresh] < 10).all()


def test_gammas_and_an_ordinary_fresh_arm_run_in_one_program():
    study = tiny.study(
        fresh={"gamma": 0.0},
        transition=("abrupt", "smooth"),
        gamma=(0.2, 0.8),
        warm_start_epochs=0,
        equal_updates=False,
    )
    assert [(a.values["transition"], a.values["gamma"]) for a in study.arms] == [
        ("abrupt", None), ("smooth", 0.0), ("smooth", 0.2), ("smooth", 0.8),
    ]  # fmt: skip
    assert [a.fresh for a in study.arms] == [study.arms[0].arm] + [study.arms[1].arm] * 3
    assert len(plan.programs(study)) == 1
    found = tiny.trained(study)
    alone = tiny.trained(tiny.study(warm_start_epochs=(0,), equal_updates=False))
    ordinary = found[found.transition == "abrupt"]
    assert (ordinary.train_loss.to_numpy() == alone.train_loss.to_numpy()).all()
    losses = found[found.seed == 0].groupby("arm").train_loss.first()
    assert losses.nunique() == 4


def test_gamma_of_one_is_refused():
    for gamma in (1.0, 1 - 1e-9, 1e-60):  # as single precision has them: 1, 1, 0
        with pytest.raises(InputError, match=f"gamma={gamma}"):
            tiny.study(fresh={"gamma": 0.0}, transition="smooth", gamma=gamma, warm_start_epochs=0)

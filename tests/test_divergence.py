"""Contract 6: one bad trial hurts no other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from compiler import needs_compiler

from plastic_jax.kernels import Form
from plastic_jax.results import tables
from plastic_jax.study.config import Config
from plastic_jax.train import core

# 6. One bad trial hurts no other.


@pytest.mark.parametrize(
    ("kernels", "block", "group", "fields"),
    [
        ("mapped", 1, 1, dict(optimizer="sgd")),
        ("packed", 8, 1, dict(optimizer="sgd")),
        ("packed", 4, 1, dict(tiny.SMALL_RESNET, optimizer="sgd")),
        ("packed", 4, 4, dict(tiny.SMALL_RESNET, optimizer="sgd")),
        pytest.param("native", 1, 1, dict(optimizer="adam"), marks=needs_compiler),
    ],
)
def test_a_diverging_neighbour_changes_nothing(kernels, block, group, fields):
    form = dict(kernels=kernels, slots=8, block=block, group=group)
    both = tiny.trained(tiny.study(**fields, norm="none", learning_rate=(0.01, 1e30)), **form)
    good = tiny.trained(tiny.study(**fields, norm="none", learning_rate=(0.01,)), **form)
    bad = both[both.learning_rate == 1e30]
    assert not good.diverged.any() and good.train_loss.notna().all()
    kept = both[both.learning_rate == 0.01]
    tiny.same(good.assign(arm=0), kept.drop(columns="learning_rate").assign(arm=0))
    assert bad.groupby("trial").diverged.sum().eq(1).all()
    assert bad[bad.diverged][["train_loss", "test_accuracy", "test_loss", "fit_accuracy"]].isna().all(axis=None)
    last = bad.groupby("trial").tail(1)
    assert last.diverged.all(), "a diverged trial has no later rows"


@pytest.mark.parametrize("where", ["a parameter", "a running statistic", "an image's features"])
@pytest.mark.parametrize("kernels", ["mapped", pytest.param("native", marks=needs_compiler)])
def test_a_step_that_is_not_finite_leaves_all_as_it_was(kernels, where):
    """Parameters, moments and statistics to the last bit; the step is counted, and the trial marked."""
    point = Config(model="mlp", width=6, depth=1, norm="batch", batch_size=4)
    one = core.Core(point, tiny.SPEC.shape, tiny.SPEC.classes, Form(kernels))
    state = one.init(jnp.uint32(0), 50)
    if where == "a parameter":
        state.params["module_2"]["bias"] = jnp.array([jnp.inf, 0.0, 0.0, 0.0, 0.0])
    elif where == "a running statistic":
        state.batch_stats["module_1"]["norm"]["mean"] = jnp.full(6, jnp.nan)
    else:
        state.params["module_1"]["linear"]["kernel"] = jnp.full((16, 6), jnp.inf)
    after = tiny.one_step(one, state)
    assert after.diverged and after.step == 1
    for name in ("params", "optimiser", "batch_stats"):
        for a, b in zip(jax.tree.leaves(getattr(after, name)), jax.tree.leaves(getattr(state, name)), strict=True):
            np.testing.assert_array_equal(a, b)


# Found in review.


def test_a_trial_that_diverges_right_after_an_evaluation_has_a_row_of_its_own(tmp_path):
    """Its first non-finite loss falls on the first step of an epoch: the good row before it stays."""
    rates = tuple(float(10.0**k) for k in range(0, 31, 3))
    study = tiny.study(learning_rate=rates, norm="none", optimizer="sgd", equal_updates=False)
    found = tiny.trained(study)
    tables.write(found, tmp_path / "results.parquet", study.swept)
    last = found.groupby("trial").tail(1)
    assert last.diverged.sum() > 10 and not last.diverged.all()
    assert found[found.diverged].step.gt(0).all()

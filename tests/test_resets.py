"""Re-initialised modules: how they are named, and what is drawn anew."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import stats

from plastic_jax import models
from plastic_jax.data import DatasetSpec
from plastic_jax.errors import InputError
from plastic_jax.kernels import Form
from plastic_jax.study import plan
from plastic_jax.study.config import Config, Sweep
from plastic_jax.train import core
from plastic_jax.train.state import Beginning


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("1+2+3", "1-3"),
        ("2-3+1", "1-3"),
        ("3 + 1", "1+3"),
        (6, "6"),
        ("1-1", "1"),
        ("none", "none"),
        ("5+1-2", "1-2+5"),
    ],
)
def test_one_spelling_of_a_reset(given, text):
    assert Sweep.of({"reset": given}).values["reset"] == (text,)


def test_resets_are_swept_by_commas():
    assert Sweep.of({"reset": "none,1-3,2+6"}).values["reset"] == ("none", "1-3", "2+6")
    with pytest.raises(InputError, match="twice"):
        Sweep.of({"reset": "1-2,1+2"})


@pytest.mark.parametrize("value", ["", "0", "3-1", "1,", "a", "1..3", "-1", "1+", "99999", True, 1.5])
def test_a_malformed_reset_is_refused(value):
    with pytest.raises(InputError, match="reset"):
        Sweep.of({"reset": value})


# Re-initialised modules.


def begun(redrawn, carry_optimizer=True, count=7, **changes):
    """(before, after): states at the start of a tuning stage that re-draws `redrawn`; before: trained by hand."""
    point = Config(**{**tiny.CONFIG, "warm_start_epochs": 2, **changes})
    one = core.Core(point, tiny.SPEC.shape, tiny.SPEC.classes, Form("mapped"))
    mask = np.isin(np.arange(1, models.modules(point.model, point.depth) + 1), redrawn)

    def start(seed):
        state = one.init(seed, 50)
        trained = jax.tree.map(lambda leaf: leaf + 1 + 0 * leaf, {"params": state.params, "stats": state.batch_stats})
        opt = jax.tree.map(lambda leaf: leaf + count, state.optimiser)
        order = jnp.arange(50, dtype=jnp.int32)
        state = dataclasses.replace(
            state, params=trained["params"], batch_stats=trained["stats"], optimiser=opt, order=order
        )
        stage = tiny.stage(seed=seed, reset_optimizer=np.bool_(not carry_optimizer), redrawn=mask)
        how = Beginning(fresh=np.bool_(False), begin=np.bool_(True), resume=np.bool_(False))
        return state, one.start(state, stage, tiny.sample(), how, None)

    return one, jax.jit(start)


def equal(a, b):
    return all((x == y).all() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("redrawn", [(), (1,), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "momentum"])
def test_untouched_modules_stay_bit_for_bit_and_the_others_start_anew(redrawn, optimizer):
    one, start = begun(redrawn, optimizer=optimizer)
    before, after = jax.device_get(start(np.uint32(3)))
    initial = jax.device_get(one.init(np.uint32(3), 50))
    for number in (1, 2, 3):
        name, new = f"module_{number}", number in redrawn
        weights = after.params[name], before.params[name]
        assert equal(*weights) is not new
        if name in before.batch_stats:
            assert equal(after.batch_stats[name], (initial if new else before).batch_stats[name])
        if new and name != "module_3":  # a norm's scale and bias are constants
            assert equal(after.params[name]["norm"], initial.params[name]["norm"])
        moments = [tree for tree in _trees(after.optimiser) if name in tree]
        assert moments and all((leaf == (0 if new else 7)).all() for t in moments for leaf in jax.tree.leaves(t[name]))
    if optimizer == "adam":
        assert after.optimiser.count == (0 if len(redrawn) == 3 else 7)


def _trees(state):
    return [getattr(state, name) for name in state._fields if name != "count"]


def test_redrawn_weights_are_not_the_first_ones():
    one, start = begun((1, 2, 3))
    _, after = start(np.uint32(3))
    assert not equal(after.params["module_1"]["linear"], one.init(np.uint32(3), 50).params["module_1"]["linear"])


@pytest.mark.parametrize("initialisation", ["pytorch", "he", "lecun"])
def test_reset_modules_follow_the_initialisers_distribution(initialisation):
    """Over 300 seeds: mean, variance and Kolmogorov-Smirnov against the closed form; seeds are independent."""
    _, start = begun((2,), initialisation=initialisation)
    _, after = jax.vmap(start)(np.arange(300, dtype=np.uint32))
    drawn = np.asarray(after.params["module_2"]["linear"]["kernel"])  # [300, 8, 8], fan-in 8
    flat = drawn.reshape(-1)
    variance = {"pytorch": 1 / 3, "he": 2, "lecun": 1}[initialisation] / 8
    assert abs(flat.mean()) < 5 * np.sqrt(variance / flat.size)
    assert flat.var() == pytest.approx(variance, rel=0.03)
    scale = np.sqrt(variance)
    form = (
        stats.uniform(-np.sqrt(3) * scale, 2 * np.sqrt(3) * scale)
        if initialisation == "pytorch"
        else stats.truncnorm(-2, 2, scale=scale / 0.8796256610342398)
    )
    assert stats.kstest(flat, form.cdf).pvalue > 1e-3
    assert abs(np.corrcoef(drawn[:-1].reshape(-1), drawn[1:].reshape(-1))[0, 1]) < 0.04


def test_a_reset_acts_when_tuning_begins_and_shares_its_pretraining():
    """One pretraining for all resets of a seed; resetting all modules is the intervention `reinitialise`."""
    study = tiny.study(warm_start_epochs=3, reset=("none", "1", "3", "1-3"), equal_updates=False, seeds=1)
    (program,) = plan.programs(study)
    assert sum(node.stage.name == "pretraining" for node in program.nodes) == 1
    found = tiny.trained(study)
    tuning = found[found.stage == "tuning"].groupby("arm").first()
    assert tuning.train_loss.nunique() == len(tuning) == 5
    whole = tiny.trained(tiny.study(warm_start_epochs=3, intervention="reinitialise", equal_updates=False, seeds=1))
    one, other = (t[t.warm_start_epochs == 3] for t in (found[found.reset == "1-3"], whole))
    assert one.test_loss.tolist() == other.test_loss.tolist()


def test_a_resnet_has_six_modules():
    spec = DatasetSpec("noise", 50, 30, (8, 8, 1), 5)
    more = dict(model="resnet", width=2, depth=1, equal_updates=False, seeds=1)
    assert tiny.study(reset=("1-5", "6"), spec=spec, **more).trials
    with pytest.raises(InputError, match="1 to 6"):
        tiny.study(reset="7", spec=spec, **more)

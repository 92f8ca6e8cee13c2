"""Optimisers against `torch.optim` (fixtures from make_fixtures.py), schedules in closed form."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiler import needs_compiler

from plastic_jax import kernels
from plastic_jax.errors import InputError
from plastic_jax.kernels import Form
from plastic_jax.methods import optimisers
from plastic_jax.methods.interventions.weight_decay import ENTRY
from plastic_jax.methods.schedules import SCHEDULES, schedule_factor
from plastic_jax.study.config import Config, Sweep

FIXTURE = np.load(Path(__file__).parent / "fixtures" / "optimisers.npz")
RUNS = [name for name in FIXTURE.files if "/" in name]
FUSED = kernels.adam(Form("native"))


def decayed(optimiser, gradients, state, params, rate, weight_decay, decoupled):
    """An update with the intervention `weight_decay`, put together as the core does."""
    view = SimpleNamespace(params=params, weight_decay=weight_decay, point=Config(decoupled=decoupled))
    change = (lambda update: ENTRY.update(update, view)) if decoupled else None
    return optimiser.update(ENTRY.gradient(gradients, view), state, params, rate, change=change)


def run(optimiser, decoupled, params, grads, rates, weight_decay):
    """Parameters after each step; all arguments but the first two are arrays."""

    def step(carry, xs):
        params, state = carry
        params, state = decayed(optimiser, xs[0], state, params, xs[1], weight_decay, decoupled)
        return (params, state), params

    return jax.lax.scan(step, (params, optimiser.init(params)), (grads, rates))[1]


def test_fixture_holds_every_optimiser():
    names = {name.split("/")[0] for name in RUNS}
    assert names == {*optimisers.OPTIMISERS, "adam_decoupled"} and len(RUNS) == 9


# In float32, Optax's 1 - .999^t alone is off by 1e-5 at t = 1; a step of Adam is at most 0.03.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-5)])
@pytest.mark.parametrize(
    ("name", "fused"),
    [(name, None) for name in RUNS]
    + [pytest.param(name, FUSED, marks=needs_compiler) for name in RUNS if name.startswith("adam")],
)
def test_twenty_steps_equal_pytorchs(name, fused, dtype, tolerance):
    spelled, weight_decay = name.split("/")
    optimiser = optimisers.build(spelled.split("_")[0], fused=fused)
    with jax.enable_x64(dtype == "float64"):
        params, grads, rates = (jnp.asarray(FIXTURE[key], dtype) for key in ("params", "grads", "rates"))
        decay = jnp.asarray(float(weight_decay), dtype)
        after = jax.jit(run, static_argnums=(0, 1))(optimiser, "_" in spelled, params, grads, rates, decay)
    assert after.dtype == dtype
    # Gradients go up to some hundred, and with them SGD's parameters.
    expected = FIXTURE[name]
    np.testing.assert_allclose(after, expected, rtol=tolerance, atol=tolerance * 0.1)


@pytest.mark.parametrize("name", optimisers.OPTIMISERS)
def test_decoupled_decay_comes_beside_the_update(name):
    """Decoupled: new = plain update's new - rate * decay * old, and the state never sees it."""
    params = {"a": jnp.asarray([1.0, -2.0]), "b": jnp.asarray([[3.0]])}
    grads = {"a": jnp.asarray([0.5, 0.25]), "b": jnp.asarray([[-1.0]])}
    plain = optimisers.build(name)
    state = plain.init(params)

    @jax.jit
    def both(grads, state, params):
        return (
            plain.update(grads, state, params, 0.1),
            decayed(plain, grads, state, params, 0.1, jnp.float32(0.5), decoupled=True),
        )

    (without, plain_state), (with_decay, decoupled_state) = both(grads, state, params)
    for new, old, expected in zip(*(jax.tree.leaves(tree) for tree in (with_decay, params, without)), strict=True):
        np.testing.assert_allclose(new, expected - 0.1 * 0.5 * old, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(plain_state), jax.tree.leaves(decoupled_state), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("name", optimisers.OPTIMISERS)
def test_trials_with_their_own_hyperparameters_share_a_program(name, decoupled):
    """vmap over rates and decays gives each trial what it gets alone; the state is all arrays."""
    optimiser = optimisers.build(name)
    random = np.random.default_rng(1)
    params = jnp.asarray(random.standard_normal((3, 4)), jnp.float32)
    grads = jnp.asarray(random.standard_normal((3, 5, 4)), jnp.float32)
    rates = jnp.asarray([1e-3, 1e-1, 0.0])[:, None] * jnp.ones((3, 5))
    decays = jnp.asarray([0.0, 0.1, 0.1])
    state = jax.vmap(optimiser.init)(params)
    leaves = jax.tree.leaves(state)
    assert all(leaf.shape[0] == 3 and not np.any(leaf) for leaf in leaves)

    stacked = jax.vmap(lambda *args: run(optimiser, decoupled, *args))(params, grads, rates, decays)
    traces = []

    def counted(*args):
        traces.append(args[0])
        return run(*args)

    alone = jax.jit(counted, static_argnums=(0, 1))
    for trial in range(3):
        expected = alone(optimiser, decoupled, params[trial], grads[trial], rates[trial], decays[trial])
        np.testing.assert_allclose(stacked[trial], expected, rtol=1e-6, atol=1e-7)
    # Equal optimisers share one compiled program; rates and decays are traced.
    alone(optimisers.build(name), decoupled, params[0], grads[0], rates[1], decays[1])
    assert len(traces) == 1
    # A rate of zero leaves the parameters where they are.
    np.testing.assert_array_equal(stacked[2], np.broadcast_to(params[2], (5, 4)))


@pytest.mark.parametrize("fused", [None, pytest.param(FUSED, marks=needs_compiler)])
@pytest.mark.parametrize("name", optimisers.OPTIMISERS)
def test_without_a_go_nothing_changes(name, fused):
    """Not a bit, although the gradient is no number; and the step after is as if it had not been."""
    optimiser = optimisers.build(name, fused=fused)
    random = np.random.default_rng(2)
    params = {"a": jnp.asarray(random.standard_normal((7, 5)), jnp.float32), "b": jnp.ones(3), "c": jnp.ones((0, 2))}
    update = jax.jit(optimiser.update)
    before = update(params, optimiser.init(params), params, 0.1)  # any gradient does
    nans = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    params, state = before
    stopped = update(nans, state, params, 0.1, False)
    assert jax.tree.structure(stopped) == jax.tree.structure(before)
    for a, b in zip(jax.tree.leaves(stopped), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(update(nans, state, params, 0.1)[0]))


@needs_compiler
def test_fused_adam_is_one_call_that_copies_nothing():
    """Parameters and moments are updated in place."""
    optimiser = optimisers.build("adam", fused=FUSED)
    params = {"a": jnp.ones((64, 64)), "b": jnp.ones(64)}

    def steps(params, state):
        def step(carry, _):
            params, state = carry
            grads = jax.tree.map(lambda leaf: 2 * leaf, params)
            return optimiser.update(grads, state, params, 0.1), None

        return jax.lax.scan(step, (params, state), None, 3)[0]

    lowered = jax.jit(steps, donate_argnums=(0, 1)).lower(params, optimiser.init(params))
    text = lowered.compile().as_text()
    assert text.count('custom_call_target="plastic_jax_adam"') == 1
    assert "f32[64,64]{1,0} copy(" not in text


@needs_compiler
def test_fused_adam_overflows_where_optax_does():
    """Not sooner or later: the square of a gradient decides whether its parameter ever moves again."""
    for gradient in (1e18, 1e19, 2e19, 1e21, np.inf, np.nan):
        grads, params = jnp.full(20, gradient, jnp.float32), jnp.ones(20)
        plain, fused = (
            jax.jit(o.update)(grads, o.init(params), params, 0.1)
            for o in (optimisers.build("adam"), optimisers.build("adam", fused=FUSED))
        )
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(fused), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


@needs_compiler
@pytest.mark.parametrize(
    "grads", [{"a": np.ones(1, "f")}, {"a": np.ones(9, "f")}, {"a": jnp.ones(5, jnp.bfloat16)}, {"a": np.ones(5, int)}]
)
def test_fused_adam_refuses_what_does_not_belong_together(grads):
    optimiser, params = optimisers.build("adam", fused=FUSED), {"a": jnp.ones(5)}
    with pytest.raises(ValueError, match="same shapes, all float32"):
        optimiser.update(grads, optimiser.init(params), params, 0.1)
    low = {"a": jnp.ones(5, jnp.bfloat16)}
    with pytest.raises(ValueError, match="float32 or float64"):
        optimiser.update(low, optimiser.init(low), low, 0.1)


def test_types_survive_x64():
    with jax.enable_x64(True):
        params = jnp.ones(3, jnp.float32)
        for name in optimisers.OPTIMISERS:
            optimiser = optimisers.build(name)
            new, state = optimiser.update(params, optimiser.init(params), params, jnp.asarray(0.1), jnp.asarray(0.1))
            kinds = {leaf.dtype for leaf in jax.tree.leaves((new, state)) if leaf.ndim}
            assert kinds == {jnp.dtype("float32")}


def test_schedules():
    steps, total = jnp.arange(0, 11), 10
    expected = {
        "constant": np.ones(11),
        "linear": 1 - np.arange(11) / 10,
        "cosine": (1 + np.cos(np.pi * np.arange(11) / 10)) / 2,
    }
    assert set(expected) == set(SCHEDULES)
    traces = []

    @jax.jit
    @partial(jax.vmap, in_axes=(None, 0, None))
    def factor(schedule, step, total):
        traces.append(schedule)
        return schedule_factor(schedule, step, total)

    for place, name in enumerate(SCHEDULES):
        factors = factor(place, steps, total)
        assert factors.dtype == jnp.float32
        np.testing.assert_allclose(factors, expected[name], atol=1e-6)
        # Past the end, and for a stage without steps, it stays within [0, 1].
        assert 0 <= schedule_factor(place, 15, 10) <= 1 and schedule_factor(place, 0, 0) == 1
    # The schedule is traced: one program serves all.
    assert len(traces) == 1
    # Trials side by side have each its own.
    mixed = jax.vmap(schedule_factor, (0, None, None))(jnp.arange(len(SCHEDULES)), 3, total)
    np.testing.assert_allclose(mixed, [expected[name][3] for name in SCHEDULES], atol=1e-6)


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match=r"'lion'.*adam, rmsprop, sgd, momentum"):
        optimisers.build("lion")
    with pytest.raises(InputError, match=r"--config.schedule='step' is not allowed.*constant, cosine, linear"):
        Sweep.of({"schedule": "step"})

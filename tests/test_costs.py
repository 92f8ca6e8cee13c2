"""Costs read off a program, against closed forms, the networks' own arrays and what the compiler finds."""

import closed_forms
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_net
from cost_points import SHAPES, arguments, compiled_step, mlp, resnet, shape_of, spec

from plastic_jax import data as data_sets
from plastic_jax import models
from plastic_jax.data import DatasetSpec
from plastic_jax.methods.optimisers import OPTIMISERS, Optimiser
from plastic_jax.study.config import Config
from plastic_jax.train import count, trial_axis
from plastic_jax.train.costs import _costs, _Program, costs


def bytes_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# Counts by hand and known totals


def test_resnet_18_takes_the_known_flops():
    of = data_sets.spec("cifar10")
    found = costs(Config(), of)
    assert found.parameters == 11_173_962
    assert closed_forms.step_flops(Config(), of) == pytest.approx(374e9, rel=0.003)
    assert 0.993 < found.step_flops / 374e9 < 1
    stem, head, modules = 1024 * 9 * 3 * 64, 512 * 10, 1024 * 4 * 9 * 64 * 64
    for pixels, w in ((256, 128), (64, 256), (16, 512)):
        modules += pixels * (9 * w // 2 * w + 3 * 9 * w * w + w // 2 * w)
    assert found.padded_step_flops == 128 * 2 * (3 * (stem + modules + head) - stem)
    assert found.padded_step_flops / 128 == pytest.approx(3.33e9, rel=0.001)
    # A third of the convolutions of a step, whose stem has no input gradient.
    assert found.evaluation_flops == pytest.approx(2.89e9 / 3, rel=0.01)
    assert found.dataset_bytes == 60_000 * (32 * 32 * 3 + 4)
    # Each of 614 400 outputs, and the same less its mean; what the ReLUs give to convolutions, which is all but the
    # shortcuts' outputs and the last block's; what the head takes; the images. And three vectors for each of 20 norms.
    shortcuts, last, channels = 57_344, 8192, 5 * (64 + 128 + 256 + 512)
    values = 2 * 614_400 + (614_400 - shortcuts - last) + 512 + 3072
    assert found.step_bytes == 4 * (128 * values + 3 * channels) + 3 * 4 * 50_000 == found.activation_bytes


def test_perceptron_takes_the_products_of_its_matrices():
    point, of = mlp(width=7, depth=2, batch_size=5, norm="none", optimizer="sgd"), spec("digits")
    found = costs(point, of)
    weights = [64 * 7, 7 * 7, 7 * 10]
    assert found.padded_step_flops == 5 * 2 * (3 * sum(weights) - weights[0])
    assert found.parameters == sum(weights) + 7 + 7 + 10
    # Bias and ReLU for each unit and again for the mask, mask and bias gradient; images; logits; update.
    others = 6 * 14 + 4 * 64 + 19 * 10
    closed = found.padded_step_flops + 5 * others + 3 * found.parameters
    assert closed == closed_forms.step_flops(point, of) and 0.9 < found.step_flops / closed <= 1
    assert found.evaluation_flops == pytest.approx(2 * sum(weights) + 2 * 14 + 4 * 64, rel=0.1)


def test_a_program_is_read_once_for_a_network():
    """Tracing takes a second or two; the plan asks for each of its programs, and more than once."""
    _costs.cache_clear()
    of = DatasetSpec("noise", 128, 64, SHAPES["cifar"], 10)
    for changes in ({}, {"tuning_epochs": 7}, {"learning_rate": 0.1}):
        assert costs(Config(**changes), of).parameters == 11_173_962
    assert (_costs.cache_info().misses, _costs.cache_info().hits) == (1, 2)


CASES = [
    (resnet(width=width, depth=depth, norm=norm, optimizer=optimizer, batch_size=32), shape)
    for (width, depth), shape in (((4, 1), "digits"), ((8, 2), "cifar"), ((3, 3), (7, 5, 2)), ((64, 2), "cifar"))
    for norm, optimizer in (("batch", "adam"), ("layer", "momentum"), ("none", "rmsprop"))
] + [(mlp(width=20, depth=3, norm=norm), "digits") for norm in ("batch", "layer", "none")]


@pytest.mark.parametrize(("point", "shape"), CASES, ids=lambda v: str(v)[:60])
def test_the_walk_finds_what_the_closed_forms_say(point, shape):
    """Products exactly; all FLOPs to within what XLA computes anew, which the closed forms count."""
    of = spec(shape) if isinstance(shape, str) else DatasetSpec("noise", 128, 64, shape, 10)
    found, closed = costs(point, of), closed_forms.tally(point, of)
    assert found.padded_step_flops == point.batch_size * closed.padded
    program = _Program(point.compiled(), of, ())
    assert program.outputs == point.batch_size * closed.outputs
    assert sum(p.inside for p in program.products) == point.batch_size * closed.products
    assert 0.85 < found.step_flops / closed_forms.step_flops(point, of) <= 1
    if point.width == 64:
        assert found.step_flops == pytest.approx(closed_forms.step_flops(point, of), rel=0.01)
    assert 0.9 < found.evaluation_flops / closed_forms.evaluation_flops(point, of) < 1.05
    # A block's input and two of its outputs; what XLA repeats ahead of them the closed form alone counts.
    if point.norm == "layer" or point.model == "mlp":
        assert program.alive == pytest.approx(closed.alive, abs=1)
    else:
        assert closed.alive / 2 <= program.alive <= closed.alive


def test_a_users_own_network_and_optimiser_have_their_own_costs(register):
    register(models.MODELS, "small", models.Model(lambda point, classes: small_net.SmallNet(point.width, classes)))
    register(OPTIMISERS, "lion", Optimiser(optax.scale_by_lion))
    of, point = spec("digits"), Config(model="small", optimizer="lion", width=3, batch_size=4)
    found = costs(point, of)
    _, state, _, sample, _ = arguments(point, of)
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert found.state_bytes == bytes_of(state) + bytes_of(sample)
    first, second, hidden, head = 64 * 9 * 1 * 3, 16 * 9 * 3 * 6, 16 * 6 * 12, 12 * 10
    assert found.padded_step_flops == 4 * 2 * (3 * (first + second + hidden + head) - first)
    assert found.step_flops > 0.8 * found.padded_step_flops
    compiled = compiled_step(point, of).cost_analysis()["flops"]
    assert found.step_flops == pytest.approx(compiled, rel=0.15)


def test_an_intervention_adds_its_own():
    of, plain = spec("digits"), mlp(norm="none")
    with_it = costs(plain.replace(l2_init=0.1), of)
    parameters = costs(plain, of).parameters
    assert with_it.state_bytes == costs(plain, of).state_bytes + 4 * parameters
    assert with_it.step_flops >= costs(plain, of).step_flops + 2 * parameters


# Exact sizes


@pytest.mark.parametrize(
    ("point", "of"),
    [
        (resnet(), spec("digits")),
        (resnet(depth=3, optimizer="momentum", norm="layer"), spec("cifar", classes=100)),
        (resnet(depth=2, optimizer="rmsprop", norm="none", validation_fraction=0.15), spec("fashion")),
        (resnet(compute_dtype="bfloat16", train_examples=100), spec("digits")),
        (mlp(norm="none", optimizer="sgd", train_examples=30), spec("cifar")),
        (mlp(norm="batch", validation_fraction=0.3, train_examples=20), spec("fashion", classes=3)),
        (mlp(norm="layer", optimizer="rmsprop", depth=1), spec("digits")),
    ],
)
def test_parameters_and_state_are_exact(point, of):
    found = costs(point, of)
    _, state, _, sample, data = arguments(point, of)
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert found.state_bytes == bytes_of(state) + bytes_of(sample)
    assert found.dataset_bytes == bytes_of(data)


def test_state_is_exact_in_float64():
    point = mlp(norm="batch", compute_dtype="float64")
    with jax.enable_x64(True):
        _, state, _, sample, _ = arguments(point, spec("digits"))
        expected = bytes_of(state) + bytes_of(sample)
    assert costs(point, spec("digits")).state_bytes == expected


def test_activations_follow_the_compute_dtype():
    of = spec("cifar", train=50_000, test=10_000)
    single = costs(resnet(width=64, depth=2), of)
    half, double = (costs(resnet(width=64, depth=2, compute_dtype=d), of) for d in ("bfloat16", "float64"))
    # The images and the orders are not halved: less than 1 %.
    assert half.activation_bytes / single.activation_bytes == pytest.approx(0.5, rel=0.01)
    assert double.activation_bytes / single.activation_bytes == pytest.approx(2, rel=0.01)
    assert half.state_bytes == single.state_bytes
    assert half.step_flops == pytest.approx(single.step_flops, rel=0.01)  # values that are cast count


def test_a_device_holds_its_slots_and_the_trials_that_compute():
    found = costs(mlp(), spec("digits"))
    own, step = found.state_bytes + found.carried_bytes, found.carried_bytes
    alone = found.device_bytes(1, 1)
    assert alone == found.dataset_bytes + found.trial_bytes
    assert alone - found.dataset_bytes - own == max(step + found.step_bytes, found.activation_bytes)
    # One more slot is one more state before and after; blocks that follow one another start from a slice.
    assert found.device_bytes(9, 1) - found.device_bytes(8, 1) == own
    assert found.device_bytes(9, 1) - alone == 8 * own + step
    # A block of several keeps what those that are done have.
    assert found.device_bytes(8, 8) == found.dataset_bytes + 8 * (own + 2 * step + found.packed_bytes)
    assert found.device_bytes(16, 8) == found.dataset_bytes + 16 * own + 8 * (3 * step + found.packed_bytes)
    assert found.device_bytes(1, 8) == alone
    assert found.state_bytes > found.carried_bytes > 3 * 4 * found.parameters


# What the walk has to know


def flops_of(function, *shapes):
    return count.flops(jax.make_jaxpr(function)(*(shape_of(shape, jnp.float32) for shape in shapes)).jaxpr)


def test_a_loops_body_counts_as_often_as_it_runs():
    def turn(x, w):
        return jnp.maximum(x @ w, 0)

    once = 2 * 16 * 8 * 8 + 16 * 8
    assert flops_of(turn, (16, 8), (8, 8)) == once
    assert flops_of(lambda x, w: jax.lax.scan(lambda c, _: (turn(c, w), None), x, None, 20)[0], (16, 8), (8, 8)) == (
        20 * once
    )
    assert flops_of(lambda x, w: jax.lax.fori_loop(0, 20, lambda _, c: turn(c, w), x), (16, 8), (8, 8)) == (
        20 * (once + 1)  # and the counter
    )
    nested = lambda x, w: jax.lax.scan(  # noqa: E731
        lambda c, _: (jax.lax.scan(lambda d, _: (jax.jit(turn)(d, w), None), c, None, 3)[0], None), x, None, 5
    )[0]
    assert flops_of(nested, (16, 8), (8, 8)) == 15 * once
    # A rematerialised product is computed forwards, again, and for two gradients.
    again = jax.grad(lambda x, w: jax.checkpoint(lambda x, w: jnp.sin(x @ w))(x, w).sum(), (0, 1))
    found = count.products(jax.make_jaxpr(again)(*(jnp.ones(shape) for shape in ((16, 8), (8, 4)))).jaxpr)
    assert sum(one.inside * one.times for one in found) == pytest.approx(4 * 2 * 16 * 8 * 4, abs=2 * 16 * 8 * 4)
    branches = lambda x, w: jax.lax.cond(x[0, 0] > 0, turn, lambda x, w: x, x, w)  # noqa: E731
    assert once <= flops_of(branches, (16, 8), (8, 8)) <= once + 4


def test_each_device_of_a_sharded_program_counts():
    mesh = trial_axis.mesh(jax.devices()[:4])
    sharded = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(jax.P("trials"), jax.P()), out_specs=jax.P("trials")
    )
    along, whole = (jax.NamedSharding(mesh, jax.P(*names)) for names in (("trials",), ()))
    given = shape_of((16, 8), jnp.float32, along), shape_of((8, 8), jnp.float32, whole)
    assert count.flops(jax.make_jaxpr(sharded)(*given).jaxpr) == 2 * 16 * 8 * 8


def test_what_cannot_be_counted_is_said():
    def until(x):
        return jax.lax.while_loop(lambda c: c.sum() < 10, lambda c: c + 1, x)

    def called(x):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    for function, says in (
        (until, ("a while loop's body is counted once",)),
        (called, ("pure_callback is not counted",)),
        (jnp.sin, ()),
    ):
        assert count.unread(jax.make_jaxpr(function)(jnp.ones(3)).jaxpr) == says


class Searching(nn.Module):
    """A network with a loop whose turns are known only as it runs."""

    classes: int

    @nn.compact
    def __call__(self, images, *, train):
        del train
        x = nn.Dense(8)(images.reshape(images.shape[0], -1))
        largest = jax.lax.while_loop(lambda c: c.max() > 1, lambda c: c / 2, jax.lax.stop_gradient(x))
        return nn.Dense(self.classes)(x + largest)


def test_a_users_loop_of_unknown_length_is_said(register):
    register(models.MODELS, "searching", models.Model(lambda _, classes: Searching(classes), plain=True))
    found = costs(Config(model="searching", batch_size=8), spec("digits"))
    assert found.unread == ("a while loop's body is counted once",)
    assert costs(mlp(), spec("digits")).unread == () == costs(resnet(), spec("digits")).unread
    _costs.cache_clear()


class Recurrent(nn.Module):
    """One layer, 20 times, as a user may write it with layers of Flax's own."""

    classes: int
    turns: int

    @nn.compact
    def __call__(self, images, *, train):
        del train
        x = nn.Dense(16)(images.reshape(images.shape[0], -1))
        turn = nn.scan(
            lambda layer, x, _: (nn.relu(layer(x)), None), variable_broadcast="params", split_rngs={"params": False},
            length=self.turns,
        )  # fmt: skip
        x, _ = turn(nn.Dense(16, name="again"), x, None)
        return nn.Dense(self.classes)(x)


@pytest.mark.parametrize("turns", [1, 20])
def test_a_users_loop_counts_as_often_as_it_runs(register, turns):
    register(models.MODELS, "recurrent", models.Model(lambda _, classes: Recurrent(classes, turns), plain=True))
    found = costs(Config(model="recurrent", batch_size=8), spec("digits"))
    first, again, head = 64 * 16, 16 * 16, 16 * 10
    products = 8 * 2 * (3 * (turns * again + head) + 2 * first)
    assert found.padded_step_flops == products
    assert 1 < found.step_flops / products < 2
    _costs.cache_clear()


def test_padded_taps_are_those_of_the_layer_itself():
    """Two convolutions of equal FLOPs inside the image, one of them with padding."""
    numbers = ("NHWC", "OHWI", "NHWC")

    def both(x, y, v, w):
        padded = jax.lax.conv_general_dilated(x, v, (1, 1), ((1, 1), (1, 1)), dimension_numbers=numbers)
        inside = jax.lax.conv_general_dilated(y, w, (1, 1), ((0, 0), (0, 0)), dimension_numbers=numbers)
        return padded.sum() + inside.sum()

    # 4 x 4 pixels with 3 x 3 taps, of which 10 x 10 fall inside; and 10 x 10 pixels with one tap.
    x, y, v, w = (jnp.ones(s) for s in ((2, 4, 4, 3), (2, 10, 10, 3), (5, 3, 3, 3), (5, 1, 1, 3)))
    found = count.products(jax.make_jaxpr(jax.value_and_grad(both, (0, 1, 2, 3)))(x, y, v, w).jaxpr)
    assert len({one.inside for one in found}) == 1
    pair = 2 * 2 * 3 * 5
    assert sum(one.padded for one in found) == 3 * pair * (12 * 12 + 10 * 10)


def test_memory_is_that_of_the_program_not_of_the_configs_norm(register):
    register(models.MODELS, "plain", models.Model(lambda _, classes: Recurrent(classes, 1), plain=True))
    found = [costs(Config(model="plain", norm=norm), spec("digits")) for norm in ("none", "batch", "layer")]
    assert len({(one.step_bytes, one.activation_bytes, one.packed_bytes, one.trial_bytes) for one in found}) == 1
    _costs.cache_clear()

"""Native kernels' waiting activations: equal to layers written out, in every order in which layers may be called."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plastic_jax import models
from plastic_jax.kernels import Form, library
from plastic_jax.models import layers
from plastic_jax.models.network import Network
from plastic_jax.study.config import Config

pytestmark = pytest.mark.skipif(not library.available(), reason="no C++ compiler on this machine")
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SHAPE, CLASSES = (6, 8, 3), 5


def conv(number, x, **more):
    return layers.Conv(4, name=f"conv_{number}", **more)(x)


def norm(number, x, train, kind="batch"):
    return layers.normalise(kind, f"norm_{number}", x, train)


def usual(x, train):
    x = layers.relu(norm(1, conv(1, x), train))
    return layers.relu(norm(2, conv(2, x, stride=2), train))


def norm_without_relu(x, train):
    return norm(2, conv(2, norm(1, conv(1, x), train)), train)


def relu_twice(x, train):
    x = layers.relu(layers.relu(norm(1, conv(1, x), train)))
    return conv(2, x)


def relu_without_norm(x, train):
    return norm(2, conv(2, layers.relu(conv(1, x))), train)


def norm_twice(x, train):
    return layers.relu(norm(2, norm(1, conv(1, x), train), train))


def sum_of_two_normed(x, train):
    return layers.relu(layers.add(norm(1, conv(1, x), train), norm(2, conv(2, x, taps=1), train)))


def sum_without_relu(x, train):
    total = layers.add(norm(1, conv(1, x), train), norm(2, conv(2, x), train))
    return conv(3, total)


def sum_with_a_rectified_norm(x, train):
    return layers.relu(layers.add(norm(1, conv(1, x), train), layers.relu(norm(2, conv(2, x), train))))


def sum_of_a_rectified_norm_and_one_that_is_not(x, train):
    return layers.relu(layers.add(layers.relu(norm(2, conv(2, x), train)), norm(1, conv(1, x), train)))


def sum_of_sums(x, train):
    first = layers.add(norm(1, conv(1, x), train), norm(2, conv(2, x), train))
    return layers.relu(layers.add(norm(3, conv(3, x), train), first))


def sum_with_a_convolution(x, train):
    return layers.relu(layers.add(norm(1, conv(1, x), train), conv(2, x)))


def sum_of_convolutions(x, train):
    return norm(3, layers.relu(layers.add(conv(1, x), conv(2, x))), train)


def used_twice(x, train, once=False):
    x = layers.relu(norm(1, conv(1, x), train))
    x = layers.shared(x) if once else x
    return layers.relu(layers.add(norm(2, conv(2, x), train), x))


def convolved_twice(x, train):
    x = norm(1, conv(1, x), train)
    return layers.add(conv(2, layers.relu(x)), conv(3, x))


def normed_in_two_ways(x, train):
    x = conv(1, x)
    return layers.relu(layers.add(norm(1, x, train), norm(2, x, train)))


def convolution_alone(x, train):
    return conv(2, conv(1, x), stride=2)


def with_biases(x, train):
    return norm(2, conv(2, layers.relu(conv(1, x, use_bias=True)), use_bias=True), train)


def layer_norm(x, train):
    return layers.relu(norm(2, conv(2, layers.relu(norm(1, conv(1, x), train, "layer"))), train, "layer"))


def mixed_norms(x, train):
    return layers.relu(norm(2, norm(1, conv(1, x), train), train, "layer"))


ORDERS = [
    usual, norm_without_relu, relu_twice, relu_without_norm, norm_twice, sum_of_two_normed, sum_without_relu,
    sum_with_a_rectified_norm, sum_of_a_rectified_norm_and_one_that_is_not, sum_of_sums, sum_with_a_convolution,
    sum_of_convolutions, used_twice, partial(used_twice, once=True), convolved_twice, normed_in_two_ways,
    convolution_alone, with_biases, layer_norm, mixed_norms,
]  # fmt: skip


class Net(nn.Module):
    order: object
    flat: bool

    @nn.compact
    def __call__(self, images, *, train):
        x = self.order(images, train)
        x = layers.flatten(x) if self.flat else layers.pool(x)
        return layers.logits(layers.Dense(CLASSES, full_precision=True, name="head")(x))


def outcome(module, form):
    """Loss, hits, statistics, gradients and an evaluation; no scale, bias or statistic is 0 or 1."""
    network = Network(module, SHAPE, "pytorch", "float64", Form(form))
    params, stats = network.init(jax.random.key(1))
    draw = np.random.default_rng(0)
    params, stats = jax.tree.map(lambda a: a + 0.2 * draw.uniform(size=a.shape), (params, stats))
    images = draw.normal(size=(4, *SHAPE))
    labels = draw.integers(0, CLASSES, 4).astype(np.int32)

    def both(params, stats):
        found = network.gradients(params, stats, images, labels)
        return found, network.evaluate(params, stats, images, labels, jnp.ones(4, bool))

    return quick_jit(both)(params, stats)


def assert_equal(module):
    for a, b in zip(*(jax.tree.leaves(outcome(module, form)) for form in ("native", "mapped")), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: str(getattr(order, "__name__", "used_twice_but_shared")))
def test_layers_may_be_called_in_any_order(order, flat):
    with jax.enable_x64(True):
        assert_equal(Net(order, flat))


@pytest.mark.parametrize(("norm", "depth"), [("batch", 1), ("batch", 2), ("layer", 1), ("none", 1)])
def test_native_resnets_equal_mapped_ones(norm, depth):
    with jax.enable_x64(True):
        assert_equal(models.MODELS["resnet"].build(Config(width=2, depth=depth, norm=norm), CLASSES))

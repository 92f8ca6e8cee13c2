"""The other convolutions equal the plain one, and compile to what XLA's CPU backend runs fast."""

import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiler import needs_compiler
from convolution_cases import KINDS, TRIALS, assert_close, conv, operands, quick_jit, with_gradients
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from plastic_jax import kernels, models
from plastic_jax.kernels import Form, Mapped, library
from plastic_jax.study.config import Config

CANONICAL = "b01f_01io->b01f"

WAYS = ("plain", "mended", "products", "native")


def first_trial(function):
    return lambda *stacked: function(*(array[0] for array in stacked))


@pytest.mark.parametrize("size", [(8, 5), (1, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_plain_in_float64(kind, size):
    with jax.enable_x64(True):
        stacked = operands(kind, size, jnp.float64)
        plain, mended = (with_gradients(name, kind) for name in ("plain", "mended"))

        @quick_jit
        def compare(*stacked):
            return [(t(mended)(*stacked), t(plain)(*stacked)) for t in (first_trial, jax.vmap)]

        for actual, expected in compare(*stacked):
            assert_close(actual, expected, 1e-13)


@pytest.mark.parametrize(
    ("kind", "batch", "size", "channels", "outputs"),
    [
        ((3, 1, 1), 19, (6, 8), 3, 5),  # two slices and a rest; a banded product forwards
        ((3, 1, 1), 16, (4, 4), 8, 8),  # in both directions
        ((3, 1, 1), 9, (5, 7), 16, 9),
        ((3, 1, 2), 9, (7, 8), 4, 6),
        ((1, 0, 2), 11, (8, 8), 4, 6),
        ((3, 1, 1), 3, (4, 4), 2, 2),  # less than a slice
    ],
)
def test_products_equal_plain_in_float64(kind, batch, size, channels, outputs):
    taps, pad, stride = kind
    draw = np.random.default_rng(0)
    with jax.enable_x64(True):
        images = jnp.asarray(draw.normal(size=(batch, *size, channels)))
        kernel = jnp.asarray(draw.normal(size=(taps, taps, channels, outputs)))

        def both(name):
            def loss(images, kernel):
                pads = ((pad, pad), (pad, pad))
                out = conv(name)(images, kernel, (stride, stride), pads)
                return jnp.sin(out).sum(), out

            return quick_jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(images, kernel)

        assert_close(jax.tree.leaves(both("products")), jax.tree.leaves(both("plain")), 1e-13)


@pytest.mark.parametrize("kind", [(3, 1, 1), (3, 1, 2)])
def test_kernel_gradients_of_products_are_rounded_to_bfloat16_once(kind):
    """However many slices there are: the sums of 64 of them are float32."""
    taps, pad, stride = kind
    draw = np.random.default_rng(0)
    images = jnp.asarray(draw.normal(1, 1, (512, 4, 4, 16)), jnp.bfloat16)
    kernel = jnp.asarray(draw.normal(size=(taps, taps, 16, 3)), jnp.bfloat16)
    gradient = jnp.asarray(draw.normal(1, 1, (512, 4 // stride, 4 // stride, 3)), jnp.bfloat16)

    def pulled(images, kernel, gradient, name):
        pads = ((pad, pad), (pad, pad))
        one = lambda k: conv(name)(images, k, (stride, stride), pads)  # noqa: E731
        return jax.vjp(one, kernel)[1](gradient)[0]

    found = pulled(images, kernel, gradient, "products")
    assert found.dtype == jnp.bfloat16
    with jax.enable_x64(True):
        exact = np.asarray(pulled(*(jnp.asarray(a, jnp.float64) for a in (images, kernel, gradient)), "plain"))
    # Half a unit in the last of bfloat16's eight places, and a little for the float32 sums.
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("kind", KINDS[:2])
def test_equals_plain_in_low_precision(kind, dtype, tolerance):
    stacked = operands(kind, (7, 8), dtype)
    plain, mended = (quick_jit(first_trial(with_gradients(n, kind))) for n in ("plain", "mended"))
    assert_close(mended(*stacked), plain(*stacked), tolerance)


@pytest.mark.parametrize("name", ["mended", pytest.param("native", marks=needs_compiler)])
@pytest.mark.parametrize("kind", [(3, 1, 2), (1, 0, 2)])
def test_equals_plain_inside_map_scan_vmap_and_shard_map(kind, name):
    devices = len(jax.devices())
    stacked = operands(kind, (7, 8), jnp.float32, trials=devices)
    function = with_gradients(name, kind)
    expected = quick_jit(jax.vmap(with_gradients("plain", kind)))(*stacked)
    mesh = jax.make_mesh((devices,), ("trials",), axis_types=(AxisType.Auto,))

    def mapped(*args):
        return lax.map(lambda xs: function(*xs), args)

    def scanned(*args):
        return lax.scan(lambda carry, xs: (carry, function(*xs)), (), args)[1]

    for transform in (mapped, scanned, jax.vmap(function)):
        assert_close(quick_jit(transform)(*stacked), expected, 1e-6)
        sharded = jax.shard_map(transform, mesh=mesh, in_specs=P("trials"), out_specs=P("trials"))
        assert_close(quick_jit(sharded)(*stacked), expected, 1e-6)


@pytest.mark.parametrize("shared", ["images", "kernel"])
def test_gradient_of_an_operand_that_all_shards_share(shared):
    """In a shard_map the gradient of a replicated operand is summed over the shards."""
    devices, kind = len(jax.devices()), (3, 1, 2)
    images, kernels, gradients = operands(kind, (7, 8), jnp.float32, trials=devices)
    images, kernels = (images[0], kernels) if shared == "images" else (images, kernels[0])
    specs = tuple(P() if a.ndim == 4 else P("trials") for a in (images, kernels))
    mesh = jax.make_mesh((devices,), ("trials",), axis_types=(AxisType.Auto,))

    def local_gradients(name):
        def function(images, kernels, gradients):
            images = images if images.ndim == 4 else images[0]
            kernel = kernels if kernels.ndim == 4 else kernels[0]
            _, *pulled = with_gradients(name, kind)(images, kernel, gradients[0])
            return tuple(a if a_spec == P() else a[None] for a, a_spec in zip(pulled, specs, strict=True))

        return jax.shard_map(function, mesh=mesh, in_specs=(*specs, P("trials")), out_specs=specs)

    actual, expected = (quick_jit(local_gradients(name))(images, kernels, gradients) for name in ("mended", "plain"))
    assert_close(actual, expected, 1e-6)


def test_hessian_vector_product_equals_plain():
    """Curvature measurements differentiate the gradient once more, forwards."""
    kind = (3, 1, 2)
    with jax.enable_x64(True):
        images, kernels, _ = operands(kind, (7, 8), jnp.float64)

        def product(name, images, kernel, direction):
            def loss(kernel):
                out = conv(name)(images, kernel, (2, 2), ((1, 1), (1, 1)))
                return jnp.sum(jnp.tanh(out))

            forward_over_reverse = jax.jvp(jax.grad(loss), (kernel,), (direction,))[1]
            reverse_over_reverse = jax.grad(lambda k: jnp.vdot(jax.grad(loss)(k), direction))
            return forward_over_reverse, reverse_over_reverse(kernel)

        here = [name for name in WAYS if name != "native" or library.available()]
        both = quick_jit(lambda *args: [product(name, *args) for name in here])
        plain, *others = both(images[0], kernels[0], kernels[1])
        for other in others:
            assert_close(other, plain, 1e-12)


def convolution_layouts(compiled_text):
    """How often each layout stands behind a convolution in a compiled program's text."""
    return Counter(re.findall(r" convolution\(.*dim_labels=([^,\s]+)", compiled_text))


class Mended(Mapped):
    """Kernels of mended convolutions, which no form offers."""

    def convolve(self, x, kernel_TOhwI, stride, pad):
        kernel_HWIO = kernel_TOhwI[0].transpose(1, 2, 3, 0)
        return conv("mended")(x.values[0], kernel_HWIO, (stride, stride), ((pad, pad), (pad, pad)))[None]


def training_loop_layouts(name, side):
    """The layouts in a scan over steps of a map over trials that train a small ResNet."""
    point = Config(width=2, depth=1, initialisation="he")
    network = models.network(point, (side, side, 3), 3, Form(name))
    labels = jnp.zeros(8, jnp.int32)

    def step(variables, images):
        found = network.gradients(*variables, images, labels)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables[0], found.gradients)
        return params, found.batch_stats

    def train(variables, images_NBHWC):
        def all_trials(variables, images):
            return lax.map(lambda v: step(v, images), variables), None

        return lax.scan(all_trials, variables, images_NBHWC)[0]

    variables = jax.eval_shape(jax.vmap(network.init), jax.random.split(jax.random.key(0), TRIALS))
    images = jax.ShapeDtypeStruct((4, 8, side, side, 3), jnp.float32)
    with jax.default_device(jax.devices("cpu")[0]):
        lowered = quick_jit(train).lower(variables, images)
    return convolution_layouts(lowered.compile().as_text())


def test_products_have_no_slow_convolution_in_a_training_loop():
    layouts = training_loop_layouts("products", 16)
    assert set(layouts) == {CANONICAL}
    assert layouts.total() < 24  # the kernels' gradients are products


@pytest.mark.parametrize("side", [16, 8])
def test_mended_has_no_slow_convolution_in_a_training_loop(side, monkeypatch):
    """XLA's CPU backend is fast in a loop only on the canonical layout (jax-ml/jax#12868).

    The last module's images are 2x2 and 1x1 here, where XLA likes to exchange image and kernel.
    """
    monkeypatch.setitem(kernels.KERNELS, "mended", Mended)
    layouts = training_loop_layouts("mended", side)
    assert set(layouts) == {CANONICAL}
    # 12 convolutions forward, and for kernels; one less for images; a few may become products.
    assert 20 < layouts.total() <= 12 + 12 + 11


def test_plain_has_slow_convolutions_in_a_training_loop():
    """If this fails, XLA no longer needs the mended convolutions: measure, then remove them."""
    layouts = training_loop_layouts("mapped", 16)
    assert layouts.total() - layouts[CANONICAL] >= 12, layouts


def test_taps_that_see_only_padding_cost_nothing():
    """On a 1x1 image the middle one of nine taps is all that matters, in the gradients as well."""
    kind = (3, 1, 1)
    arguments = first_trial(lambda *arrays: arrays)(*operands(kind, (1, 1), jnp.float32))
    text = str(jax.make_jaxpr(with_gradients("mended", kind))(*arguments))
    shapes = re.findall(r"f32(\[[\d,]+\]) = conv_general_dilated", text)
    assert shapes == ["[3,1,1,5]", "[3,1,1,3]", "[3,1,1,5]"]
    assert "pad[" in text  # the kernel's gradient is zero for the other eight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("trials", "group"),
    [(1, 1), (3, 1), (3, 3), (4, 1), (4, 2), (4, 4), (5, 1), (5, 5), (6, 1), (6, 2), (6, 3), (6, 6)],
)
def test_packed_convolutions_equal_one_for_each_trial(kind, trials, group):
    """Values, and gradients of images and kernels, in float64."""
    stride = kind[2]
    with jax.enable_x64(True):
        images, kernel, gradient = operands(kind, (7, 8), jnp.float64, trials)
        kernel_TOhwI = kernel.transpose(0, 4, 1, 2, 3)

        def loss(form, images, kernel_TOhwI):
            def block(images, kernel_TOhwI, gradient):
                made = kernels.of(form, len(images), "float64")
                x = made.convolution(made.enter(images), kernel_TOhwI, None, stride)
                return (made.by_trial(x, x.values).values * gradient).sum()

            if form.block > 1:
                return block(images, kernel_TOhwI, gradient)
            return sum(block(*(a[t : t + 1] for a in (images, kernel_TOhwI, gradient))) for t in range(trials))

        both = [
            quick_jit(jax.value_and_grad(partial(loss, form), (0, 1)))(images, kernel_TOhwI)
            for form in (Form("packed", trials, group), Form("mapped"))
        ]
        assert_close(*both, 1e-13)

"""The other convolutions equal the plain one, and compile to what XLA's CPU backend runs fast."""

import itertools
import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from plastic_jax import kernels, models
from plastic_jax.errors import InputError
from plastic_jax.kernels import Form, Mapped, library, loops, units
from plastic_jax.kernels.units import joined, unit
from plastic_jax.study.config import Config

TRIALS, BATCH, INPUTS, OUTPUTS = 2, 3, 3, 5
# XLA's passes as always, but little of LLVM's, which is what compiling takes its time for.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
NHWC = ("NHWC", "HWIO", "NHWC")
# (taps, padding, stride): all that a ResNet has.
KINDS = [(3, 1, 1), (3, 1, 2), (1, 0, 1), (1, 0, 2)]
CANONICAL = "b01f_01io->b01f"
needs_compiler = pytest.mark.skipif(not library.available(), reason="no C++ compiler on this machine")


WAYS = ("plain", "mended", "products", "native")


def conv(name):
    """A convolution of NHWC images and an HWIO kernel by that way."""

    def convolve(images, kernel, strides, pads):
        if name == "plain":
            return lax.conv_general_dilated(images, kernel, strides, pads, dimension_numbers=NHWC)
        if name == "native":
            return loops.convolution(images, kernel, strides, pads, units.convolve)
        return loops.convolution(images, kernel, strides, pads, lambda *x: loops.differentiable(*x, name))

    return convolve


def operands(kind, size, dtype, trials=TRIALS):
    """Images, kernels and output gradients with a leading trial axis."""
    taps, padding, stride = kind
    random = np.random.default_rng(0)
    out = [(side + 2 * padding - taps) // stride + 1 for side in size]
    shapes = (
        (trials, BATCH, *size, INPUTS),
        (trials, taps, taps, INPUTS, OUTPUTS),
        (trials, BATCH, *out, OUTPUTS),
    )
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


def with_gradients(name, kind):
    """(images, kernel, output gradient) -> (output, image gradient, kernel gradient)."""
    _, padding, stride = kind

    def function(images, kernel, gradient):
        def convolve(images, kernel):
            pads = ((padding, padding), (padding, padding))
            return conv(name)(images, kernel, (stride, stride), pads)

        out, pullback = jax.vjp(convolve, images, kernel)
        return out, *pullback(gradient)

    return function


def assert_close(actual, expected, tolerance):
    """Within the tolerance of the largest value, with equal types and shapes."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max())


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


# Sizes that whole blocks of pixels cover, and others; channels that fill vectors, share them, and neither.
NATIVE_SIZES = [(8, 8), (4, 4), (32, 32), (9, 7), (5, 3), (2, 2), (1, 1), (16, 12), (6, 17)]
NATIVE_CHANNELS = [(3, 8), (8, 8), (5, 10), (1, 3), (16, 16), (24, 48), (8, 16), (64, 32), (33, 5), (32, 64), (10, 24)]


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_native_equals_plain(kind, dtype):
    taps, pad, stride = kind
    draw = np.random.default_rng(0)
    pads = ((pad, pad), (pad, pad))
    # Sizes, channels and batches in other combinations for each kind.
    turn = KINDS.index(kind)
    sizes = itertools.islice(itertools.cycle(NATIVE_SIZES), turn, turn + len(NATIVE_CHANNELS))
    with jax.enable_x64(True):
        for n, (size, (channels, outputs)) in enumerate(zip(sizes, NATIVE_CHANNELS, strict=True)):
            images = draw.normal(size=((1, 2, 5)[n % 3], *size, channels)).astype(dtype)
            kernel = draw.normal(size=(taps, taps, channels, outputs)).astype(dtype)
            plain = partial(lax.conv_general_dilated, dimension_numbers=NHWC)
            out = jax.eval_shape(lambda x, w: plain(x, w, (stride, stride), pads), images, kernel)  # noqa: B023
            gradient = draw.normal(size=out.shape).astype(dtype)
            operands = [jnp.asarray(a) for a in (images, kernel, gradient)]
            text = str(jax.make_jaxpr(with_gradients("native", kind))(*operands))
            if min(size) > 2:  # else taps that see only padding are cut off, which leaves other convolutions
                assert text.count("ffi_call[") == 2 and "conv_general_dilated" not in text
            actual = with_gradients("native", kind)(*operands)
            expected = quick_jit(with_gradients("plain", kind))(*(a.astype(jnp.float64) for a in operands))
            assert [a.dtype for a in actual] == [dtype] * 3
            wide = [a.astype(jnp.float64) for a in actual]
            assert_close(wide, expected, 3e-6 if dtype == "float32" else 1e-14)


@needs_compiler
def test_native_reads_nothing_but_its_operands_and_repeats_itself_to_the_bit():
    """Vectors stick out of arrays and borders; what they find there must not count."""
    kind, odd = (3, 1, 1), (jnp.full((1, 9, 9, 64), jnp.nan), jnp.ones((3, 3, 64, 5)), jnp.ones((1, 9, 9, 5)))
    stacked = [a[0] for a in operands(kind, (7, 8), jnp.float32)]
    function = with_gradients("native", kind)
    first = function(*stacked)
    function(*odd)  # leaves NaN in the memory that calls share
    for a, b in zip(first, function(*stacked), strict=True):
        assert np.isfinite(a).all() and (np.asarray(a) == np.asarray(b)).all()


@needs_compiler
def test_native_falls_back_and_computes_no_gradient_that_is_not_used():
    images, kernel, gradient = (a[0] for a in operands((3, 1, 1), (7, 8), jnp.float32))
    low = [a.astype(jnp.bfloat16) for a in (images, kernel, gradient)]
    assert "ffi_call" not in str(jax.make_jaxpr(with_gradients("native", (3, 1, 1)))(*low))

    def loss(images, kernel):
        return (gradient * conv("native")(images, kernel, (1, 1), ((1, 1), (1, 1)))).sum()

    for wanted, results in ((0, r"f32\[3,7,8,3\]\S* f32\[3,3,3,0\]"), (1, r"f32\[0,7,8,3\]\S* f32\[3,3,3,5\]")):
        text = jax.jit(jax.grad(loss, wanted)).lower(images, kernel).compile().as_text()
        text = re.sub(r",? ?/\*index=\d+\*/", "", text).replace(", ", " ")
        assert re.search(rf'\({results}[^\n]*custom_call_target="plastic_jax_backward"', text)


def unit_of(convolve):
    """As `convolution.unit`, written with plain operations and another convolution."""

    def unit(images, kernel, norm, stride):
        if norm is not None:
            mean, factor, bias = norm[:, None, None, None]
            images = jax.nn.relu((images - mean) * factor + bias)
        pad = kernel.shape[0] // 2
        out = convolve(images, kernel, (stride, stride), ((pad, pad), (pad, pad)))
        return out, jnp.stack([out.mean((0, 1, 2)), out.var((0, 1, 2))])

    return unit


PLAIN_UNIT = unit_of(partial(lax.conv_general_dilated, dimension_numbers=NHWC))


def unit_operands(kind, size, channels, outputs, batch, dtype):
    draw = np.random.default_rng(0)
    images = draw.normal(3, 1, (batch, *size, channels))
    kernel = draw.normal(0, 1 / (kind[0] * channels**0.5), (kind[0], kind[0], channels, outputs))
    norm = np.stack([draw.normal(3, 0.3, channels), draw.normal(1, 0.5, channels), draw.normal(0, 1, channels)])
    return [jnp.asarray(a, dtype) for a in (images, kernel, norm)]


def unit_loss(unit, stride, images, kernel, norm):
    out, statistics = unit(images, kernel, norm, stride)
    return jnp.sin(out).sum() + (jnp.tanh(statistics / 9) * jnp.arange(1, 1 + statistics.size).reshape(2, -1)).sum()


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_units_equal_norm_relu_convolution_and_statistics(kind, dtype):
    """With a norm and without; gradients come by way of the output and of its statistics."""
    turn, stride = KINDS.index(kind), kind[2]
    sizes = itertools.islice(itertools.cycle(NATIVE_SIZES), turn, turn + len(NATIVE_CHANNELS))
    shapes = list(zip(sizes, NATIVE_CHANNELS, strict=True))[: 3 if dtype == "float32" else None]
    with jax.enable_x64(True):
        for n, (size, (channels, outputs)) in enumerate(shapes):
            images, kernel, norm = unit_operands(kind, size, channels, outputs, (1, 2, 5)[n % 3], dtype)
            for given in (norm, None):
                both = (images, kernel, given)
                which = (0, 1, 2) if n % 3 and given is not None else (0, 1)

                def all_of(unit, *both):
                    gradients = jax.grad(partial(unit_loss, unit, stride), which)(*both)  # noqa: B023
                    return unit(*both, stride), gradients

                actual = quick_jit(partial(all_of, unit))(*both)
                wide = [None if a is None else a.astype(jnp.float64) for a in both]
                expected = quick_jit(partial(all_of, PLAIN_UNIT))(*wide)
                assert {a.dtype for a in jax.tree.leaves(actual)} == {jnp.dtype(dtype)}
                actual = jax.tree.map(lambda a: a.astype(jnp.float64), actual)
                assert_close(actual, expected, 2e-5 if dtype == "float32" else 1e-13)


@needs_compiler
def test_curvature_of_a_unit_equals_plain():
    """Differentiated once more, forwards and backwards."""
    with jax.enable_x64(True):
        given = unit_operands((3, 1, 2), (7, 8), 3, 5, 4, "float64")
        directions = [jnp.cos(7 * a) for a in given]

        def products(unit, *given):
            slope = jax.grad(partial(unit_loss, unit, 2), (0, 1, 2))
            dot = lambda *x: sum(jnp.vdot(a, b) for a, b in zip(slope(*x), directions, strict=True))  # noqa: E731
            return jax.jvp(slope, given, tuple(directions))[1], jax.grad(dot, (0, 1, 2))(*given)

        actual, expected = (quick_jit(partial(products, u))(*given) for u in (unit, PLAIN_UNIT))
        assert_close(actual, expected, 1e-12)


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("other", ["none", "as it is", "normed"])
def test_joins_equal_a_sum_of_norms_and_its_relu(other, dtype):
    """Their values, gradients and curvature."""
    with jax.enable_x64(True):
        for size, channels, batch in [((8, 8), 8, 3), ((3, 5), 10, 2), ((2, 2), 33, 1), ((7, 7), 16, 5)]:
            images, _, norm = unit_operands((1, 0, 1), size, channels, 1, batch, dtype)
            more, _, more_norm = unit_operands((1, 0, 1), size, channels, 1, batch, dtype)
            given = {
                "none": (images, norm, None, None),
                "as it is": (images, norm, jnp.sin(more), None),
                "normed": (images, norm, jnp.sin(more), more_norm),
            }[other]
            which = tuple(i for i, a in enumerate(given) if a is not None)

            def plain(images, norm, other, other_norm):
                norm, other_norm = (None if a is None else a[:, None, None, None] for a in (norm, other_norm))
                total = (images - norm[0]) * norm[1] + norm[2]
                if other_norm is not None:
                    other = (other - other_norm[0]) * other_norm[1] + other_norm[2]
                return jax.nn.relu(total if other is None else total + other)

            def all_of(join, *given):
                slope = jax.grad(lambda *x: jnp.sin(3 * join(*x)).sum(), which)  # noqa: B023
                push = tuple(None if a is None else jnp.cos(7 * a) for a in given)
                return join(*given), slope(*given), jax.jvp(slope, given, push)[1]

            actual = quick_jit(partial(all_of, joined))(*given)
            assert {a.dtype for a in jax.tree.leaves(actual)} == {jnp.dtype(dtype)}
            wide = [None if a is None else a.astype(jnp.float64) for a in given]
            actual = jax.tree.map(lambda a: a.astype(jnp.float64), actual)
            expected = quick_jit(partial(all_of, plain))(*wide)
            assert_close(actual, expected, 2e-5 if dtype == "float32" else 1e-13)


@needs_compiler
def test_native_calls_refuse_operands_that_do_not_belong_together():
    """They would read what is not theirs."""
    images, kernel, norm = unit_operands((3, 1, 1), (4, 4), 3, 5, 2, "float32")
    with jax.enable_x64(True):
        for wrong in (norm[:, :2], norm[:2], norm.astype(jnp.float64)):
            with pytest.raises(ValueError, match="a norm is"):
                unit(images, kernel, wrong, 1)
            with pytest.raises(ValueError, match="a norm is"):
                joined(images, wrong, None, None)
            with pytest.raises(ValueError, match="a norm is"):
                joined(images, norm, images, wrong)
        with pytest.raises(ValueError, match="must be float32 or float64"):
            joined(images.astype(jnp.bfloat16), norm.astype(jnp.bfloat16), None, None)
        with pytest.raises(ValueError, match="what is added is"):
            joined(images, norm, images[:1], None)
        for of_channels in (lambda k: unit(images, k, norm, 1), lambda k: unit(images, k, None, 1)):
            with pytest.raises((ValueError, TypeError)):
                of_channels(kernel[:, :, :2])
        with pytest.raises((ValueError, TypeError)):
            conv("native")(images, kernel[:, :, :2], (1, 1), ((1, 1), (1, 1)))


@needs_compiler
def test_a_unit_hides_no_nan():
    images, kernel, norm = unit_operands((3, 1, 1), (4, 4), 8, 8, 2, "float32")
    out, statistics = unit(images.at[1, 2, 3, 5].set(jnp.nan), kernel, norm, 1)
    assert not np.isfinite(out[1]).all() and np.isfinite(out[0]).all() and not np.isfinite(statistics).any()


def test_native_is_refused_where_there_is_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(library, "_reason", library._reason.__wrapped__)  # what other tests have loaded stays
    assert not library.available()
    with pytest.raises(InputError, match=r"kernels is 'native'.* there is none"):
        kernels.require("native", "cpu")
    with pytest.raises(InputError, match="programs for gpu"):
        kernels.require("native", "gpu")
    with pytest.raises(InputError, match=r"kernels is 'native'"):
        conv("native")(*(jnp.ones(s) for s in ((1, 4, 4, 2), (3, 3, 2, 2))), (1, 1), ((1, 1), (1, 1)))


def test_native_says_what_the_compiler_said(monkeypatch, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho no space left >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(library, "_reason", library._reason.__wrapped__)
    with pytest.raises(InputError, match="broken failed: no space left"):
        kernels.require("native", "cpu")


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

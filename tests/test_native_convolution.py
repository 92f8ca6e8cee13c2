"""The native convolution and its joined units, against JAX's own operations."""

import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiler import needs_compiler
from convolution_cases import KINDS, NHWC, assert_close, conv, operands, quick_jit, with_gradients
from jax import lax

from plastic_jax import kernels
from plastic_jax.errors import InputError
from plastic_jax.kernels import library
from plastic_jax.kernels.units import joined, unit

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

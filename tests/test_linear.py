"""The native product of linear layers against NumPy and XLA's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from plastic_jax.errors import InputError
from plastic_jax.kernels import linear, native

needs_compiler = pytest.mark.skipif(not native.available(), reason="no C++ compiler on this machine")
LAYER = (((1,), (0,)), ((), ()))
# Around the width of a vector, of two, and of a block of rows; a column, a row, a single value.
SHAPES = [
    (1, 1, 1),
    (1, 5, 16),
    (3, 7, 10),
    (7, 4, 33),
    (8, 9, 15),
    (9, 1, 100),
    (16, 31, 48),
    (33, 20, 1),
    (20, 3, 64),
]


def operands(shape, dtype):
    examples, inputs, outputs = shape
    random = np.random.default_rng(sum(shape))
    sizes = ((examples, inputs), (inputs, outputs), (examples, outputs))
    return [jnp.asarray(random.standard_normal(size), dtype) for size in sizes]


def with_gradients(dot, x, kernel, gradient):
    out, back = jax.vjp(lambda x, kernel: dot(x, kernel, LAYER), x, kernel)
    return out, *back(gradient)


@needs_compiler
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-13), ("float32", 1e-5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_numpy(shape, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        x, kernel, gradient = operands(shape, dtype)
        compiled = jax.jit(lambda *a: with_gradients(linear.dot("native"), *a))
        assert str(jax.make_jaxpr(compiled)(x, kernel, gradient)).count("ffi_call") >= 3
        found = compiled(x, kernel, gradient)
    x, kernel, gradient = (np.asarray(a, np.float64) for a in (x, kernel, gradient))
    for actual, expected in zip(found, (x @ kernel, gradient @ kernel.T, x.T @ gradient), strict=True):
        assert actual.dtype == dtype
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@needs_compiler
def test_a_nan_stays_in_its_row_and_column_and_in_no_scratch():
    """Of a wide kernel, and of one that is narrower than a vector, which is copied first."""
    x, kernel, _ = operands((9, 6, 21), "float32")
    dot = jax.jit(lambda x, kernel: linear.dot("native")(x, kernel, LAYER))
    clean = dot(x, kernel)
    assert (dot(x, kernel) == clean).all()
    found = np.isnan(dot(x.at[4, 2].set(jnp.nan), kernel))
    assert found[4].all() and not np.delete(found, 4, 0).any()
    found = np.isnan(dot(x, kernel.at[2, 20].set(jnp.nan)))
    assert found[:, 20].all() and not found[:, :20].any()
    narrow = dot(x, kernel[:, :3])
    assert np.isnan(dot(x, kernel[:, :3] * jnp.nan)).all()
    assert (dot(x, kernel[:, :3]) == narrow).all() and (dot(x, kernel) == clean).all()


@needs_compiler
def test_derivatives_of_gradients_equal_xlas():
    with jax.enable_x64(True):
        x, kernel, direction = operands((5, 4, 4), "float64")[0], *operands((4, 4, 4), "float64")[:2]

        def loss(dot, kernel):
            return jnp.sum(jnp.tanh(dot(jnp.tanh(dot(x, kernel, LAYER)), kernel, LAYER)) ** 2)

        native_one, plain = (
            jax.jvp(jax.grad(partial(loss, linear.dot(name))), (kernel,), (direction,)) for name in ("native", "plain")
        )
        for a, b in zip(native_one, plain, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@needs_compiler
def test_under_vmap_scan_and_shard_map_it_is_the_same_to_the_bit():
    x, kernel, gradient = operands((16, 6, 10), "float32")
    alone = [with_gradients(linear.dot("native"), x[i : i + 8], kernel, gradient[i : i + 8]) for i in (0, 8)]
    pairs, grads = x.reshape(2, 8, 6), gradient.reshape(2, 8, 10)

    def one(x, gradient):
        return with_gradients(linear.dot("native"), x, kernel, gradient)

    mesh = jax.make_mesh((2,), ("trials",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    sharded = jax.shard_map(
        lambda x, gradient: jax.tree.map(lambda a: a[None], one(x[0], gradient[0])),
        mesh=mesh, in_specs=P("trials"), out_specs=P("trials"),
    )  # fmt: skip
    for many in (jax.vmap(one), lambda *a: lax.map(lambda pair: one(*pair), a), sharded):
        found = jax.jit(many)(pairs, grads)
        # Sharded, the gradient of a kernel that all share is the sum over the shards.
        expected = [jnp.stack([a, b]) for a, b in zip(*alone, strict=True)]
        if many is sharded:
            expected[2] = jnp.stack([expected[2].sum(0)] * 2)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)


@needs_compiler
def test_what_is_not_written_there_is_xlas():
    native_dot = linear.dot("native")
    x, kernel, _ = operands((4, 3, 2), "float32")
    for *both, numbers in (
        (x.astype("bfloat16"), kernel.astype("bfloat16"), LAYER),
        (x[None], kernel, (((2,), (0,)), ((), ()))),
        (x, x, (((1,), (1,)), ((), ()))),
        (x[:0], kernel, LAYER),
    ):
        text = str(jax.make_jaxpr(lambda a, b, numbers=numbers: native_dot(a, b, numbers))(*both))
        assert "ffi_call" not in text
        np.testing.assert_array_equal(native_dot(*both, numbers), lax.dot_general(*both, numbers))


def test_native_is_refused_where_there_is_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native, "_reason", native._reason.__wrapped__)  # what other tests have loaded stays
    with pytest.raises(InputError, match=r"'native'.* there is none"):
        linear.dot("native")
    assert linear.dot("plain") is lax.dot_general

"""The native product of linear layers against NumPy and XLA's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiler import needs_compiler
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from plastic_jax.errors import InputError
from plastic_jax.kernels import Form, dense, library, of

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
    out, back = jax.vjp(lambda x, kernel: dot(x, kernel), x, kernel)
    return out, *back(gradient)


@needs_compiler
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-13), ("float32", 1e-5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_numpy(shape, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        x, kernel, gradient = operands(shape, dtype)
        compiled = jax.jit(lambda *a: with_gradients(dense.product, *a))
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
    dot = jax.jit(lambda x, kernel: dense.product(x, kernel))
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
            return jnp.sum(jnp.tanh(dot(jnp.tanh(dot(x, kernel)), kernel)) ** 2)

        native_one, plain = (
            jax.jvp(jax.grad(partial(loss, dot)), (kernel,), (direction,)) for dot in (dense.product, jnp.matmul)
        )
        for a, b in zip(native_one, plain, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@needs_compiler
def test_under_vmap_scan_and_shard_map_it_is_the_same_to_the_bit():
    x, kernel, gradient = operands((16, 6, 10), "float32")
    alone = [with_gradients(dense.product, x[i : i + 8], kernel, gradient[i : i + 8]) for i in (0, 8)]
    pairs, grads = x.reshape(2, 8, 6), gradient.reshape(2, 8, 10)

    def one(x, gradient):
        return with_gradients(dense.product, x, kernel, gradient)

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
    x, kernel, _ = operands((4, 3, 2), "float32")
    for both in ((x.astype("bfloat16"), kernel.astype("bfloat16")), (x[:0], kernel)):
        assert "ffi_call" not in str(jax.make_jaxpr(dense.product)(*both))
        np.testing.assert_array_equal(dense.product(*both), both[0] @ both[1])


@needs_compiler
def test_hidden_layers_are_native_and_a_head_of_few_columns_is_xlas():
    for outputs, calls in ((16, 1), (10, 0)):
        x, kernel, _ = operands((4, 3, outputs), "float32")
        made = of(Form("native"), 1, "float32")
        text = str(jax.make_jaxpr(lambda x, k, made=made: made.product(x[None], k[None]))(x, kernel))
        assert text.count("ffi_call[") == calls


def test_native_is_refused_where_there_is_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(library, "_reason", library._reason.__wrapped__)  # what other tests have loaded stays
    x, kernel, _ = operands((4, 3, 2), "float32")
    with pytest.raises(InputError, match=r"'native'.* there is none"):
        dense.product(x, kernel)

"""What networks start from: distributions, PyTorch's own layers, and the draws of an earlier version bit for bit."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from nets import build, init, quick_jit

from plastic_jax import models
from plastic_jax.errors import InputError
from plastic_jax.study.config import INITIALISATIONS, NORMS

FIXTURES = Path(__file__).parent / "fixtures"


def large_layers(initialisation):
    """{name: (layer, fan_in)} of a linear layer (300 -> 2000) and a 3x3 convolution (128 -> 128)."""
    key = jax.random.key(3)
    common = {"norm": "none", "initialisation": initialisation}
    mlp, _ = init(build("mlp", (10, 10, 3), width=2000, **common), key)
    resnet, _ = init(build(shape=(8, 8, 3), width=16, **common), key)
    return {
        "linear": (mlp["module_1"]["linear"], 300),
        "conv": (resnet["module_5"]["block_1"]["conv_2"], 9 * 128),
    }


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_pytorch_initialisation(name):
    """Uniform within 1 / sqrt(fan_in), as documented, and as PyTorch's own layers came out."""
    torch = np.load(FIXTURES / "initialisation.npz")
    layer, fan_in = large_layers("pytorch")[name]
    bound = fan_in**-0.5
    for leaf in ("kernel", "bias"):
        values = np.asarray(layer[leaf])
        assert 0.97 * bound < np.abs(values).max() <= bound * (1 + 1e-6)
        # Four standard errors: of the mean, the standard deviation, and the quartiles, which bound
        # and variance do not fix.
        error = 4 * bound / values.size**0.5
        np.testing.assert_allclose(values.mean(), 0, atol=error * 0.58)
        np.testing.assert_allclose(values.std(), bound / 3**0.5, atol=error * 0.26)
        quartiles = np.quantile(values, [0.25, 0.5, 0.75])
        np.testing.assert_allclose(quartiles, [-bound / 2, 0, bound / 2], atol=error)
        largest, deviation = torch[f"{name}/{leaf}"]
        np.testing.assert_allclose(np.abs(values).max(), largest, rtol=0.03)
        np.testing.assert_allclose(values.std(), deviation, atol=error * 0.4)


@pytest.mark.parametrize(("initialisation", "gain"), [("he", 2.0), ("lecun", 1.0)])
def test_normal_initialisations(initialisation, gain):
    """Normal, cut off at two standard deviations, with var = gain / fan_in after the cut."""
    for layer, fan_in in large_layers(initialisation).values():
        values, deviation = np.asarray(layer["kernel"]), (gain / fan_in) ** 0.5
        error = 4 * deviation / values.size**0.5
        np.testing.assert_allclose(values.mean(), 0, atol=error)
        np.testing.assert_allclose(values.std(), deviation, atol=error * 0.7)
        # A standard normal cut off at -2 and 2 has the standard deviation 0.8796 and half of its
        # values within 0.6391.
        np.testing.assert_allclose(np.abs(values).max(), 2 * deviation / 0.8796, rtol=0.001)
        middle = np.median(np.abs(values))
        np.testing.assert_allclose(middle, 0.6391 * deviation / 0.8796, atol=error * 1.5)
        assert not np.any(layer["bias"])


def test_norms_start_neutral():
    for norm, has_statistics in (("batch", True), ("layer", False)):
        params, stats = init(build("mlp", norm=norm), jax.random.key(0))
        first = params["module_1"]["norm"]
        assert np.all(first["scale"] == 1) and not np.any(first["bias"])
        if has_statistics:
            running = stats["module_1"]["norm"]
            assert np.all(running["var"] == 1) and not np.any(running["mean"])


def test_no_two_parameters_share_a_draw():
    """The one draw is cut up without overlap, and every kernel and bias gets its part."""
    for model in models.MODELS:
        params, _ = init(build(model, (8, 8, 3), norm="none", width=4), jax.random.key(0))
        # Up to their scale, the uniform values are multiples of 2^-22: chance repeats are rare.
        values = np.concatenate([np.ravel(leaf) / np.abs(leaf).max() for leaf in jax.tree.leaves(params)])
        assert np.unique(values).size > 0.99 * values.size and np.all(values != 0)


@pytest.mark.parametrize("initialisation", INITIALISATIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("model", models.MODELS)
def test_draws_stay_what_they_were(model, norm, initialisation):
    """Bit for bit those of commit 77d88ee, where kernels were stored as they are drawn: [h, w, I, O].

    draws.npz was made by that commit's code. For each case, of width 1 (resnet) or 2, depth 1 and 4 classes:

        params = quick_jit(lambda key: models.init(module, key, (8, 8, 3)))(jax.random.key(7))["params"]
        params = flatten_dict(params)
        np.concatenate([np.ravel(params[path]) for path in sorted(params)])

    Little of LLVM's passes: with all of them, the last bit of a normal draw depends on the processor.

    LayerNorm's parameters are BatchNorm's.
    """
    with np.load(FIXTURES / "draws.npz") as file:
        expected = file[f"{model}/{'batch' if norm == 'layer' else norm}/{initialisation}"]
    width = 1 if model == "resnet" else 2
    for form in ("mapped", "packed 1x3"):
        network = build(model, (8, 8, 3), form, width=width, norm=norm, initialisation=initialisation)
        params = flatten_dict(init(network, jax.random.key(7))[0])
        as_drawn = [
            np.moveaxis(params[path], 0, -1) if params[path].ndim == 4 else params[path] for path in sorted(params)
        ]
        np.testing.assert_array_equal(np.concatenate([np.ravel(leaf) for leaf in as_drawn]), expected)


@pytest.mark.parametrize("initialisation", ["pytorch", "he"])
def test_draws_are_the_same_in_every_precision_and_under_vmap(initialisation):
    keys = jax.random.split(jax.random.key(7), 2)

    def draw(compute_dtype, keys):
        network = build("mlp", (8, 8, 3), initialisation=initialisation, compute_dtype=compute_dtype)
        return quick_jit(jax.vmap(network.init))(keys)

    single, alone = draw("float32", keys), draw("float32", keys[1:])
    with jax.enable_x64(True):
        double, single_x64 = draw("float64", keys), draw("float32", keys)
        assert {leaf.dtype for leaf in jax.tree.leaves(double)} == {np.dtype("float64")}
    half = draw("bfloat16", keys)
    for other in (double, single_x64, half):
        jax.tree.map(np.testing.assert_array_equal, other, single)
    jax.tree.map(np.testing.assert_array_equal, alone, jax.tree.map(lambda a: a[1:], single))
    kernel = single[0]["module_1"]["linear"]["kernel"]
    assert np.all(kernel[0] != kernel[1])  # another key, other values


def test_float64_is_refused_without_x64():
    network = build(compute_dtype="float64")
    with jax.enable_x64(False), pytest.raises(InputError, match="jax_enable_x64"):
        network.init(jax.random.key(0))

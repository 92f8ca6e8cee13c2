"""Networks against PyTorch's (fixtures from make_fixtures.py), and what PyTorch cannot say."""

import json
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from plastic_jax import models
from plastic_jax.errors import InputError
from plastic_jax.kernels import native

# XLA's passes as always, but little of LLVM's, which is what compiling takes its time for.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

FIXTURES = Path(__file__).parent / "fixtures"
needs_compiler = pytest.mark.skipif(not native.available(), reason="no C++ compiler on this machine")
NETWORKS = sorted(path.stem for path in FIXTURES.glob("*_*.npz"))


def build(model="resnet", **changes):
    fields = {
        "width": 2,
        "depth": 1,
        "norm": "batch",
        "initialisation": "pytorch",
        "compute_dtype": "float32",
        "classes": 4,
    }
    return models.build(model, **fields | changes)


def init(module, key, shape):
    return quick_jit(lambda key: models.init(module, key, shape))(key)


def load(name):
    """The fixture's spec and its arrays, nested by the slashes in their names."""
    with np.load(FIXTURES / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    spec = json.loads(str(arrays.pop("spec")))
    return spec, unflatten_dict(arrays, sep="/")


def loss_of(module, train):
    """(params, batch_stats, images, labels) -> (mean cross-entropy, (logits, batch_stats))."""

    def loss(params, batch_stats, images, labels):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, batch_stats = models.apply(module, variables, images, train=train)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
        return -jnp.mean(picked), (logits, batch_stats)

    return loss


def assert_trees_close(actual, expected, tolerance):
    """Same structure and shapes; each value within the tolerance of its array's largest."""
    actual, expected = flatten_dict(actual, sep="/"), flatten_dict(expected, sep="/")
    assert set(actual) == set(expected)
    for name, reference in expected.items():
        assert actual[name].shape == reference.shape, name
        atol = tolerance * max(np.abs(reference).max(), 1e-3)
        np.testing.assert_allclose(actual[name], reference, rtol=0, atol=atol, err_msg=name)


def test_fixtures_cover_both_models_and_all_norms():
    specs = [load(name)[0] for name in NETWORKS]
    for model in models.MODELS:
        assert {spec["norm"] for spec in specs if spec["model"] == model} == set(models.NORMS)


# The reference is float64 throughout, and float32 errs by rounding.
@pytest.mark.parametrize(
    ("name", "dtype", "convolution", "tolerance"),
    [(name, "float64", "mended" if name == "resnet_none" else "plain", 1e-11) for name in NETWORKS]
    + [(name, "float32", "mended", 5e-5) for name in ("mlp_batch", "mlp_layer")]
    + [
        pytest.param(name, dtype, "native", tolerance, marks=needs_compiler)
        for name in NETWORKS
        for dtype, tolerance in (("float64", 1e-11), ("float32", 5e-5))
        if name.startswith("mlp")
    ],
)
def test_equals_pytorch(name, dtype, convolution, tolerance):
    """Logits, loss, every gradient and the new running statistics, in both modes."""
    spec, fixture = load(name)
    with jax.enable_x64(dtype == "float64"):
        module = build(**spec, compute_dtype=dtype, convolution=convolution)
        params, stats = (
            jax.tree.map(lambda a: jnp.asarray(a, dtype), fixture.get(key, {})) for key in ("params", "stats")
        )
        images = jnp.asarray(fixture["images"], dtype)

        @quick_jit
        def both_modes(*args):
            results = {}
            for mode in ("train", "eval"):
                loss = loss_of(module, mode == "train")
                if "grads" in fixture[mode]:
                    results[mode] = jax.value_and_grad(loss, has_aux=True)(*args)
                else:
                    results[mode] = loss(*args), None
            return results

        results = both_modes(params, stats, images, jnp.asarray(fixture["labels"]))
    assert results["train"][1] is not None
    for mode, ((loss, (logits, new_stats)), grads) in results.items():
        expected = fixture[mode]
        assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {np.dtype(dtype)}
        np.testing.assert_allclose(logits, expected["logits"], rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(loss, expected["loss"], rtol=tolerance)
        if grads is not None:
            assert_trees_close(grads, expected["grads"], tolerance)
        expected_stats = expected.get("stats", {}) if mode == "train" else fixture.get("stats", {})
        assert_trees_close(new_stats, expected_stats, tolerance)


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3)])
@pytest.mark.parametrize("norm", models.NORMS)
@pytest.mark.parametrize("model", models.MODELS)
def test_parameters_are_counted_and_modules_named(model, norm, shape):
    for depth in (1, 3):
        module = build(model, norm=norm, depth=depth, width=3)
        variables = jax.eval_shape(lambda key: models.init(module, key, shape), jax.random.key(0))  # noqa: B023
        names = [f"module_{i + 1}" for i in range(models.modules(model, depth))]
        assert sorted(variables["params"]) == names
        # The head has no norm.
        assert sorted(variables["batch_stats"]) == (names[:-1] if norm == "batch" else [])
        assert type(variables["params"]) is dict
        count = models.parameters_count(model, width=3, depth=depth, norm=norm, classes=4, shape_HWC=shape)
        assert count == sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def test_resnet_18_has_the_known_number_of_parameters():
    module = build(width=64, depth=2, classes=10)
    shape = (32, 32, 3)
    variables = jax.eval_shape(lambda key: models.init(module, key, shape), jax.random.key(0))
    counted = models.parameters_count("resnet", width=64, depth=2, norm="batch", classes=10, shape_HWC=shape)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 11_173_962 == counted


def large_layers(initialisation):
    """{name: (layer, fan_in)} of a linear layer (300 -> 2000) and a 3x3 convolution (128 -> 128)."""
    key = jax.random.key(3)
    common = {"norm": "none", "initialisation": initialisation}
    mlp = init(build("mlp", width=2000, **common), key, (10, 10, 3))["params"]
    resnet = init(build(width=16, **common), key, (8, 8, 3))["params"]
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
    for norm, stats in (("batch", True), ("layer", False)):
        variables = init(build("mlp", norm=norm), jax.random.key(0), (8, 8, 1))
        first = variables["params"]["module_1"]["norm"]
        assert np.all(first["scale"] == 1) and not np.any(first["bias"])
        if stats:
            running = variables["batch_stats"]["module_1"]["norm"]
            assert np.all(running["var"] == 1) and not np.any(running["mean"])


def test_no_two_parameters_share_a_draw():
    """The one draw is cut up without overlap, and every kernel and bias gets its part."""
    for model in models.MODELS:
        variables = init(build(model, norm="none", width=4), jax.random.key(0), (8, 8, 3))
        leaves = jax.tree.leaves(variables["params"])
        # Up to their scale, the uniform values are multiples of 2^-22: chance repeats are rare.
        values = np.concatenate([np.ravel(leaf) / np.abs(leaf).max() for leaf in leaves])
        assert np.unique(values).size > 0.99 * values.size and np.all(values != 0)


@pytest.mark.parametrize("initialisation", ["pytorch", "he"])
def test_draws_are_the_same_in_every_precision_and_under_vmap(initialisation):
    keys = jax.random.split(jax.random.key(7), 2)
    shape = (8, 8, 3)

    def draw(compute_dtype, keys):
        module = build("mlp", initialisation=initialisation, compute_dtype=compute_dtype)
        return quick_jit(jax.vmap(lambda key: models.init(module, key, shape)))(keys)

    single, alone = draw("float32", keys), draw("float32", keys[1:])
    with jax.enable_x64(True):
        double, single_x64 = draw("float64", keys), draw("float32", keys)
        assert {leaf.dtype for leaf in jax.tree.leaves(double)} == {np.dtype("float64")}
    half = draw("bfloat16", keys)
    for other in (double, single_x64, half):
        jax.tree.map(np.testing.assert_array_equal, other, single)
    jax.tree.map(np.testing.assert_array_equal, alone, jax.tree.map(lambda a: a[1:], single))
    kernel = single["params"]["module_1"]["linear"]["kernel"]
    assert np.all(kernel[0] != kernel[1])  # another key, other values


def step_text(module, variables, images):
    """The jaxpr of a training step's gradient."""
    labels = jnp.zeros(images.shape[0], jnp.int32)
    gradient = jax.grad(loss_of(module, True), has_aux=True)
    return str(jax.make_jaxpr(gradient)(variables["params"], variables["batch_stats"], images, labels))


@pytest.mark.parametrize("norm", models.NORMS)
@pytest.mark.parametrize("model", models.MODELS)
def test_float32_stays_float32_under_x64(model, norm):
    with jax.enable_x64(True):
        module = build(model, norm=norm, convolution="mended")
        variables = jax.eval_shape(lambda key: models.init(module, key, (8, 8, 1)), jax.random.key(0))
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
        text = step_text(module, variables, jnp.ones((3, 8, 8, 1), jnp.float32))
    arrays = set(re.findall(r"\b(f64|f32|bf16)\[", text))
    assert arrays <= {"f32", "f64"} and "f32" in arrays
    # Scalars that Python numbers become are all that may be wider.
    assert not re.search(r"\bf64\[[^\]]", text)


@pytest.mark.parametrize(("model", "norm"), [("resnet", "batch"), ("mlp", "batch"), ("mlp", "layer")])
def test_bfloat16_computes_in_bfloat16_and_keeps_float32(model, norm):
    images = np.random.default_rng(0).standard_normal((16, 8, 8, 3)).astype(np.float32)
    half, single = (build(model, norm=norm, width=4, compute_dtype=d) for d in ("bfloat16", "float32"))
    variables = init(half, jax.random.key(0), (8, 8, 3))

    @quick_jit
    def both(variables, images):
        return [models.apply(module, variables, images, train=True) for module in (half, single)]

    (logits, stats), (exact, exact_stats) = both(variables, images)
    kept = {leaf.dtype for leaf in jax.tree.leaves((variables, logits, stats))}
    assert kept == {np.dtype("float32")}
    np.testing.assert_allclose(logits, exact, atol=0.1)
    assert np.any(logits != exact)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.02), stats, exact_stats)
    # All products and convolutions but the head's take bfloat16.
    text = step_text(half, variables, images)
    operation = "dot_general" if model == "mlp" else "conv_general_dilated"
    results = re.findall(rf":(\w+)\[[\d,]*\] = {operation}\[", text)
    expected = {"mlp": {"bf16", "f32"}, "resnet": {"bf16"}}[model]
    assert set(results) == expected and results[0] == "bf16"


def test_batch_norm_in_closed_form():
    """Two training passes over [2, 2, 1, 1] values 1, 2, 3, 6: mean 3, var 3.5, unbiased 14 / 3."""
    x = jnp.asarray([1.0, 2.0, 3.0, 6.0]).reshape(2, 2, 1, 1)
    layer = models.BatchNorm("float32")
    variables = layer.init(jax.random.key(0), x, train=False)
    stats = variables["batch_stats"]
    assert stats["mean"] == 0 and stats["var"] == 1
    for _ in range(2):
        out, new = layer.apply(variables, x, train=True, mutable=["batch_stats"])
        np.testing.assert_allclose(out, (x - 3) / np.sqrt(3.5 + 1e-5), rtol=1e-6)
        variables = {**variables, **new}
    mean, var = 0.19 * 3, 0.81 + 0.19 * 14 / 3
    np.testing.assert_allclose(variables["batch_stats"]["mean"], [mean], rtol=1e-6)
    np.testing.assert_allclose(variables["batch_stats"]["var"], [var], rtol=1e-6)
    out = layer.apply(variables, x, train=False)
    np.testing.assert_allclose(out, (x - mean) / np.sqrt(var + 1e-5), rtol=1e-5)


def test_batch_norm_is_exact_far_from_zero():
    """Values 4096 + {0, 1}: in float32 the mean of squares less the squared mean is 0 or 1."""
    x = 4096 + jnp.asarray([[0.0], [1.0], [1.0], [0.0]])
    layer = models.BatchNorm("float32")
    variables = layer.init(jax.random.key(0), x, train=False)
    out, _ = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(out, (x - 4096.5) / np.sqrt(0.25 + 1e-5), rtol=1e-6)


def test_batch_norm_of_a_single_value_stays_finite():
    layer = models.BatchNorm("float32")
    x = jnp.asarray([[5.0]])
    variables = layer.init(jax.random.key(0), x, train=False)
    out, new = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    assert out == 0 and np.all(np.isfinite(new["batch_stats"]["var"]))


def test_evaluation_depends_on_no_other_example():
    module = build("mlp")
    images = np.random.default_rng(0).standard_normal((4, 8, 8, 3)).astype(np.float32)
    variables = init(module, jax.random.key(0), (8, 8, 3))

    @quick_jit
    def logits(variables, images):
        return {
            (train, count): models.apply(module, variables, images[:count], train=train)[0]
            for train in (True, False)
            for count in (2, 4)
        }

    results = logits(variables, images)
    for train, equal in ((False, True), (True, False)):
        two, four = results[train, 2], results[train, 4]
        assert np.allclose(four[:2], two, atol=1e-6) is equal


def test_gradient_of_relu_at_zero_is_zero():
    """As in PyTorch. Zero images and zero biases put every unit at exactly 0."""
    module = build("mlp", norm="none", initialisation="he")
    variables = init(module, jax.random.key(0), (2, 2, 1))
    images, labels = np.zeros((3, 2, 2, 1), np.float32), np.asarray([0, 1, 1], np.int32)
    gradient = quick_jit(jax.grad(loss_of(module, True), has_aux=True))
    grads, _ = gradient(variables["params"], {}, images, labels)
    assert not np.any(grads["module_1"]["linear"]["bias"])
    assert np.any(grads["module_2"]["bias"])


def test_equal_networks_hash_equal():
    """So that one can be a static argument without being compiled again."""
    assert build() == build() and hash(build()) == hash(build())
    assert build() != build(depth=2)


@pytest.mark.parametrize("field", ["model", "norm", "initialisation", "compute_dtype", "convolution"])
def test_unknown_names_are_refused(field):
    with pytest.raises(InputError, match=f"^{field} is 'other'; it must be one of "):
        build(**{"model": "mlp"} | {field: "other"})


def test_float64_is_refused_without_x64():
    module = build(compute_dtype="float64")
    with jax.enable_x64(False), pytest.raises(InputError, match="jax_enable_x64"):
        models.init(module, jax.random.key(0), (8, 8, 1))

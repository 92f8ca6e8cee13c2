"""Networks against PyTorch's (fixtures from make_fixtures.py), and what PyTorch cannot say."""

import json
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiler import needs_compiler
from flax.traverse_util import flatten_dict, unflatten_dict
from nets import FORMS, build, init, quick_jit

from plastic_jax import kernels, models
from plastic_jax.data import DatasetSpec
from plastic_jax.errors import InputError
from plastic_jax.kernels import Form
from plastic_jax.models import layers
from plastic_jax.study.config import NORMS, Config, Sweep
from plastic_jax.train import costs

FIXTURES = Path(__file__).parent / "fixtures"
NETWORKS = sorted(path.stem for path in FIXTURES.glob("*_*.npz"))
EVERY_FORM = [pytest.param(name, marks=needs_compiler if name == "native" else ()) for name in FORMS]


def turned(name, values):
    """A convolution's kernel [h, w, I, O], as fixtures have it, is [O, h, w, I] here; all else stays."""
    return values.transpose(3, 0, 1, 2) if name.endswith("kernel") and values.ndim == 4 else values


def load(name):
    """The fixture's spec and its arrays, nested by the slashes in their names."""
    with np.load(FIXTURES / f"{name}.npz") as file:
        arrays = {key: turned(key, file[key]) for key in file.files}
    spec = json.loads(str(arrays.pop("spec")))
    return spec, unflatten_dict(arrays, sep="/")


def apply(network, params, stats, images, train):
    """Logits [T, B, classes] and new statistics of a block of T trials, from the module itself."""
    trials = jax.tree.leaves(params)[0].shape[0]
    entered = kernels.of(network.form, trials, network.compute_dtype).enter(images)
    logits, new = network.module.apply(
        {"params": params, "batch_stats": stats}, entered, train=train, mutable=["batch_stats"]
    )
    return logits, new.get("batch_stats", {})


def evaluation_loss(network, params, stats, images, labels):
    """A block's mean cross-entropies in evaluation mode, added up."""
    logits, _ = apply(network, params, stats, images, train=False)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=2)
    return -jnp.mean(picked, (1, 2)).sum()


def over(network, function, shared=0):
    """A function of one trial, for a block of them; the last `shared` arguments are the same for all."""

    def block(*given):
        own = len(given) - shared
        if network.form.block > 1:
            return jax.vmap(function, (0,) * own + (None,) * shared)(*given)
        return jax.tree.map(lambda leaf: leaf[None], function(*cut(given[:own], 0), *given[own:]))

    return block


def cut(block, trial):
    return jax.tree.map(lambda leaf: leaf[trial], block)


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
        assert {spec["norm"] for spec in specs if spec["model"] == model} == set(NORMS)


# The reference is float64 throughout, and float32 errs by rounding.
@pytest.mark.parametrize(
    ("name", "dtype", "form", "tolerance"),
    [(name, "float64", "products" if name == "resnet_none" else "mapped", 1e-11) for name in NETWORKS]
    + [(name, "float32", "products", 5e-5) for name in ("mlp_batch", "mlp_layer")]
    + [(name, "float64", form, 1e-11) for name in NETWORKS for form in ("packed", "packed 3x1", "packed 1x3")]
    + [(name, "float32", form, 5e-5) for name in ("mlp_batch", "mlp_layer") for form in ("packed", "packed 3x1")]
    + [
        pytest.param(name, dtype, "native", tolerance, marks=needs_compiler)
        for name in NETWORKS
        for dtype, tolerance in (("float64", 1e-11), ("float32", 5e-5))
        if name.startswith("mlp")
    ],
)
def test_equals_pytorch(name, dtype, form, tolerance):
    """Logits, loss, every gradient and the new running statistics, in both modes; in a block, the trial amid others."""
    spec, fixture = load(name)
    scales = np.asarray([0.7, 1, 1.3] if FORMS[form].block == 3 else [1])
    mine = len(scales) // 2
    with jax.enable_x64(dtype == "float64"):
        network = build(**spec, shape=fixture["images"].shape[1:], compute_dtype=dtype, form=form)
        params, stats, images = (
            jax.tree.map(lambda a: jnp.asarray(np.multiply.outer(scales, a), dtype), fixture.get(key, {}))
            for key in ("params", "stats", "images")
        )
        labels = jnp.asarray([np.roll(fixture["labels"], k - mine) for k in range(len(scales))])

        @quick_jit
        def both_modes(*trials):
            everything = jnp.ones(labels.shape, bool)
            train = over(network, network.gradients)(*trials), apply(network, *trials[:3], train=True)[0]
            sums = over(network, network.evaluate)(*trials, everything)
            evaluated = sums, over(network, network.logits)(*trials[:3]), apply(network, *trials[:3], train=False)
            if "grads" not in fixture["eval"]:
                return train, evaluated, {}
            return train, evaluated, jax.grad(partial(evaluation_loss, network))(*trials)

        results = jax.device_get(both_modes(params, stats, images, labels))
    kinds = {leaf.dtype for leaf in jax.tree.leaves(results)}
    assert kinds == {np.dtype(dtype), np.dtype("int32")}  # hits are counted
    assert {leaf.shape[0] for leaf in jax.tree.leaves(results)} == {len(scales)}
    (train, train_logits), ((loss, hits), logits, (same, kept)), grads = cut(results, mine)
    for mode, got, mean, correct, new_stats in (
        ("train", train_logits, train.loss, train.correct, train.batch_stats),
        ("eval", logits, loss / len(fixture["labels"]), hits, kept),
        ("eval", same, loss / len(fixture["labels"]), hits, kept),
    ):
        expected = fixture[mode]
        np.testing.assert_allclose(got, expected["logits"], rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(mean, expected["loss"], rtol=tolerance)
        assert correct == (expected["logits"].argmax(1) == fixture["labels"]).sum()
        expected_stats = expected.get("stats", {}) if mode == "train" else fixture.get("stats", {})
        assert_trees_close(new_stats, expected_stats, tolerance)
    assert_trees_close(train.gradients, fixture["train"]["grads"], tolerance)
    assert_trees_close(grads, fixture["eval"].get("grads", {}), tolerance)


def parameters(model, width, depth, norm, classes, shape_HWC):
    """Their number in closed form."""
    if model == "mlp":
        per_unit = 1 if norm == "none" else 3
        hidden = width * (np.prod(shape_HWC) + per_unit) + (depth - 1) * width * (width + per_unit)
        return hidden + (width + 1) * classes
    per_channel = 1 if norm == "none" else 2
    total, fan_in = width * (9 * shape_HWC[2] + per_channel), width
    for number in range(4):
        out = width * 2**number
        total += out * (9 * fan_in + per_channel) + (2 * depth - 1) * out * (9 * out + per_channel)
        if number > 0:
            total += out * (fan_in + per_channel)
        fan_in = out
    return total + (fan_in + 1) * classes


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3)])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("model", models.MODELS)
def test_parameters_are_counted_and_modules_named(model, norm, shape):
    for depth in (1, 3):
        network = build(model, shape, norm=norm, depth=depth, width=3)
        params, stats = jax.eval_shape(network.init, jax.random.key(0))
        names = [f"module_{i + 1}" for i in range(models.modules(model, depth))]
        assert sorted(params) == names
        # The head has no norm.
        assert sorted(stats) == (names[:-1] if norm == "batch" else [])
        assert type(params) is dict
        assert network.shapes() == {"params": params, "batch_stats": stats}
        point = Config(model=model, width=3, depth=depth, norm=norm)
        count = costs.parameters_count(point, DatasetSpec("noise", 50, 30, shape, 4))
        assert count == sum(leaf.size for leaf in jax.tree.leaves(params))
        assert count == parameters(model, 3, depth, norm, 4, shape)


def test_resnet_18_has_the_known_number_of_parameters():
    shape = (32, 32, 3)
    params, _ = jax.eval_shape(build(shape=shape, width=64, depth=2, classes=10).init, jax.random.key(0))
    point = Config(model="resnet", width=64, depth=2, norm="batch")
    counted = costs.parameters_count(point, DatasetSpec("noise", 50, 30, shape, 10))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 11_173_962 == counted


def step_text(network, params, stats, images):
    """The jaxpr of a training step's gradient, of a block of alike trials."""
    labels = jnp.zeros(images.shape[0], jnp.int32)
    block = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (network.form.block, *leaf.shape)), (params, stats))
    gradients = over(network, network.gradients, shared=2)
    return str(jax.make_jaxpr(gradients)(*block, images, labels))


@pytest.mark.parametrize("form", ["products", "packed 3x1", "packed 1x3"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("model", models.MODELS)
def test_float32_stays_float32_under_x64(model, norm, form):
    with jax.enable_x64(True):
        network = build(model, norm=norm, form=form)
        shapes = network.shapes()
        assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype("float32")}
        params, stats = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), tuple(shapes.values()))
        text = step_text(network, params, stats, jnp.ones((3, 8, 8, 1), jnp.uint8))
    arrays = set(re.findall(r"\b(f64|f32|bf16)\[", text))
    assert arrays <= {"f32", "f64"} and "f32" in arrays
    # Scalars that Python numbers become are all that may be wider.
    assert not re.search(r"\bf64\[[^\]]", text)


@pytest.mark.parametrize(("model", "norm"), [("resnet", "batch"), ("mlp", "batch"), ("mlp", "layer")])
@pytest.mark.parametrize("form", ["mapped", "packed 1x3"])
def test_bfloat16_computes_in_bfloat16_and_keeps_float32(model, norm, form):
    images = np.random.default_rng(0).standard_normal((16, 8, 8, 3)).astype(np.float32)
    half, single = (build(model, (8, 8, 3), form, norm=norm, width=4, compute_dtype=d) for d in ("bfloat16", "float32"))
    params, stats = init(half, jax.random.key(0))

    @quick_jit
    def both(params, stats, images):
        block = jax.tree.map(lambda leaf: jnp.stack([leaf] * half.form.block), (params, stats))
        return [apply(network, *block, images, train=True) for network in (half, single)]

    (logits, new), (exact, exact_new) = both(params, stats, images)
    kept = {leaf.dtype for leaf in jax.tree.leaves((params, stats, logits, new))}
    assert kept == {np.dtype("float32")}
    np.testing.assert_allclose(logits, exact, atol=0.1)
    assert np.any(logits != exact)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.02), new, exact_new)
    # All products and convolutions but the head's take bfloat16.
    text = step_text(half, params, stats, images)
    operation = "dot_general" if model == "mlp" else "conv_general_dilated"
    results = re.findall(rf":(\w+)\[[\d,]*\] = {operation}\[", text)
    expected = {"mlp": {"bf16", "f32"}, "resnet": {"bf16"}}[model]
    assert set(results) == expected and results[0] == "bf16"


def entered(x, form="mapped"):
    """Values [B, H, W, C] of one trial, as layers take them."""
    return kernels.of(FORMS[form], 1, "float32").enter(jnp.asarray(x)[None])


@pytest.mark.parametrize("form", ["mapped", "packed"])
def test_batch_norm_in_closed_form(form):
    """Two training passes over [2, 2, 1, 1] values 1, 2, 3, 6: mean 3, var 3.5, unbiased 14 / 3."""
    x = jnp.asarray([1.0, 2.0, 3.0, 6.0]).reshape(2, 2, 1, 1)
    layer = layers.BatchNorm()
    variables = layer.init(jax.random.key(0), entered(x, form), train=False)
    stats = variables["batch_stats"]
    assert stats["mean"] == 0 and stats["var"] == 1
    for _ in range(2):
        out, new = layer.apply(variables, entered(x, form), train=True, mutable=["batch_stats"])
        np.testing.assert_allclose(out.values[0], (x - 3) / np.sqrt(3.5 + 1e-5), rtol=1e-6)
        variables = {**variables, **new}
    mean, var = 0.19 * 3, 0.81 + 0.19 * 14 / 3
    np.testing.assert_allclose(variables["batch_stats"]["mean"], [[mean]], rtol=1e-6)
    np.testing.assert_allclose(variables["batch_stats"]["var"], [[var]], rtol=1e-6)
    out = layer.apply(variables, entered(x, form), train=False)
    np.testing.assert_allclose(out.values[0], (x - mean) / np.sqrt(var + 1e-5), rtol=1e-5)


@pytest.mark.parametrize("form", ["mapped", "packed"])
def test_batch_norm_is_exact_far_from_zero(form):
    """Values 4096 + {0, 1}: in float32 the mean of squares less the squared mean is 0 or 1."""
    x = 4096 + jnp.asarray([0.0, 1.0, 1.0, 0.0]).reshape(4, 1, 1, 1)
    layer = layers.BatchNorm()
    variables = layer.init(jax.random.key(0), entered(x, form), train=False)
    out, _ = layer.apply(variables, entered(x, form), train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(out.values[0], (x - 4096.5) / np.sqrt(0.25 + 1e-5), rtol=1e-6)


@pytest.mark.parametrize("form", ["mapped", "packed"])
def test_batch_norm_of_a_single_value_stays_finite(form):
    layer = layers.BatchNorm()
    x = entered(jnp.full((1, 1, 1, 1), 5.0), form)
    variables = layer.init(jax.random.key(0), x, train=False)
    out, new = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    assert out.values == 0 and np.all(np.isfinite(new["batch_stats"]["var"]))


def test_evaluation_depends_on_no_other_example():
    network = build("mlp", (8, 8, 3))
    images = np.random.default_rng(0).standard_normal((4, 8, 8, 3)).astype(np.float32)
    params, stats = init(network, jax.random.key(0))

    @quick_jit
    def logits(params, stats, images):
        block = jax.tree.map(lambda leaf: leaf[None], (params, stats))
        train = {(True, count): apply(network, *block, images[:count], train=True)[0][0] for count in (2, 4)}
        return train | {(False, count): network.logits(params, stats, images[:count]) for count in (2, 4)}

    results = logits(params, stats, images)
    for train, equal in ((False, True), (True, False)):
        two, four = results[train, 2], results[train, 4]
        assert np.allclose(four[:2], two, atol=1e-6) is equal


@pytest.mark.parametrize("form", EVERY_FORM)
def test_gradient_of_relu_at_zero_is_zero(form):
    """As in PyTorch. Zero images and zero biases put every unit at exactly 0."""
    network = build("mlp", (2, 2, 1), form, norm="none", initialisation="he")
    params, stats = quick_jit(jax.vmap(network.init))(jax.random.split(jax.random.key(0), network.form.block))
    images, labels = np.zeros((3, 2, 2, 1), np.float32), np.asarray([0, 1, 1], np.int32)
    grads = quick_jit(over(network, network.gradients, shared=2))(params, stats, images, labels).gradients
    assert not np.any(grads["module_1"]["linear"]["bias"])
    assert np.all(np.any(grads["module_2"]["bias"], axis=1))


def test_equal_networks_hash_equal():
    """So that one can be a static argument without being compiled again."""
    assert build().module == build().module and hash(build().module) == hash(build().module)
    assert build().module != build(depth=2).module
    assert build().form == build().form and hash(build().form) == hash(build().form)
    assert build().form != build(form="packed").form


@pytest.mark.parametrize("field", ["norm", "initialisation", "compute_dtype", "kernels", "model"])
def test_unknown_names_are_refused(field):
    with pytest.raises(InputError, match=f"^--config.{field}='other' is not allowed: {field} takes one of "):
        Sweep.of({field: "other"})
    if field in ("model", "kernels"):  # as tests and notebooks may give them
        with pytest.raises(InputError, match=f"^{field} is 'other'; it must be one of "):
            build("other") if field == "model" else Form("other")

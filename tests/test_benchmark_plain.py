"""The network that the benchmark compares with, of Flax's own layers, is the core's."""

import jax
import numpy as np
import optax
import pytest

from plastic_jax import models
from plastic_jax.benchmarks.plain import Plain
from plastic_jax.kernels import Form
from plastic_jax.study.config import Config


def in_flax(params, stats):
    """Our weights and statistics by the names that Flax gives the plain twin's layers: numbered as they are called."""
    found = {"params": {}, "batch_stats": {}}

    def copy(layer, names, norm):
        kernel = layer["kernel"].transpose(1, 2, 3, 0) if layer["kernel"].ndim == 4 else layer["kernel"]
        found["params"][names] = {**layer, "kernel": kernel}
        kind = "BatchNorm" if stats else "GroupNorm" if layer["kernel"].ndim == 4 else "LayerNorm"
        if norm and norm[0]:
            found["params"][f"{kind}_{names.split('_')[1]}"] = norm[0]
            found["batch_stats"][f"{kind}_{names.split('_')[1]}"] = norm[1]

    def both(module, name, own):
        return module.get(name), own.get(name)

    *hidden, head = sorted(params)
    convolutions = 0
    for name in hidden:
        module, own = params[name], stats.get(name, {})
        if "linear" in module:
            copy(module["linear"], f"Dense_{int(name[-1]) - 1}", both(module, "norm", own))
            continue
        for block in [None] if "conv" in module else sorted(module):
            layers, statistics = (module, own) if block is None else (module[block], own.get(block, {}))
            for suffix in ("", "_1", "_2", "_shortcut"):
                if f"conv{suffix}" in layers:
                    copy(layers[f"conv{suffix}"], f"Conv_{convolutions}", both(layers, f"norm{suffix}", statistics))
                    convolutions += 1
    copy(params[head], f"Dense_{0 if convolutions else len(hidden)}", None)
    return found


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("model", ["mlp", "resnet"])
def test_the_plain_twin_is_the_cores_network(model, norm):
    point = Config(model=model, width=4, depth=2, norm=norm)
    ours = models.network(point, (8, 8, 3), 5, Form("mapped"))
    draw = np.random.default_rng(3)
    images, labels = draw.integers(0, 256, (6, 8, 8, 3), np.uint8), draw.integers(0, 5, 6).astype(np.int32)
    params, stats = jax.jit(ours.init)(jax.random.key(0))
    stepped = jax.jit(ours.gradients)(params, stats, images, labels)  # statistics that are not those of the start
    twin, normalised = Plain(point, 5), (images.astype(np.float32) / 255 - 0.5) / 0.5
    drawn = jax.eval_shape(lambda: twin.init(jax.random.key(1), normalised, train=False))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(a.size for a in jax.tree.leaves(drawn["params"]))
    copied = in_flax(params, stepped.batch_stats)
    assert jax.tree.map(np.shape, copied["params"]) == jax.tree.map(lambda leaf: leaf.shape, drawn["params"])
    logits = jax.jit(lambda: twin.apply(copied, normalised, train=False))()
    expected = jax.jit(ours.logits)(params, stepped.batch_stats, images)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    trained, _ = jax.jit(lambda: twin.apply(copied, normalised, train=True, mutable=["batch_stats"]))()
    loss = optax.softmax_cross_entropy_with_integer_labels(trained, labels).mean()
    assert loss == pytest.approx(float(stepped.loss), rel=1e-5)

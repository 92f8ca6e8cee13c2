"""Blocks of trials: equal to trials one by one, safe from one another, and without a needless transpose."""

import ast
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_net
import tiny

from plastic_jax import kernels, models
from plastic_jax.kernels import Form, library
from plastic_jax.study.config import Config
from plastic_jax.train import trial_axis
from plastic_jax.train.core import Core
from plastic_jax.train.state import Sums, resident
from plastic_jax.train.trial_axis import Formulation

MODELS = Path(models.__file__).parent
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SHAPE, CLASSES = tiny.SPEC.shape, tiny.SPEC.classes
SMALL_NET = models.Model(lambda point, classes: small_net.SmallNet(point.width, classes), lambda _: 4)


def block_of(one, seeds):
    """The states of a block of trials before their first step."""
    state = jax.vmap(lambda seed: one.init(seed, 50))(jnp.asarray(seeds, jnp.uint32))
    return jax.tree.map(np.array, state)


class Block:
    """A block of trials that is trained step by step by the core, compiled once."""

    def __init__(self, one):
        self.one, self.data = one, jax.tree.map(jnp.asarray, resident(tiny.dataset()))
        images, labels = self.data.test_images, self.data.test_labels
        everything = jnp.ones(len(labels), bool)

        def step(state, stage, local):
            sums = Sums(jnp.zeros((), one.dtype), jnp.int32(0), jnp.int32(0))
            after, sums = one.step(state, sums, stage, jax.tree.map(jnp.asarray, tiny.sample()), local, self.data)
            # As in a chunk: a trial that has diverged stands still.
            return jax.tree.map(lambda new, old: jnp.where(state.diverged, old, new), after, state), sums.loss

        def measure(params, stats):
            return one.network.evaluate(params, stats, images, labels, everything)

        over = jax.vmap if one.network.form.block > 1 else (lambda f: lambda *t: jax.lax.map(lambda own: f(*own), t))
        self._step, self._measure = quick_jit(over(step)), quick_jit(over(measure))

    def train(self, state, steps, rates):
        """After so many steps, each trial with its own batches: (state, diverged and losses a step, evaluation)."""
        stages = [tiny.stage(learning_rate=jnp.asarray(rate, self.one.dtype)) for rate in rates]
        stages = jax.tree.map(lambda *leaves: np.stack(leaves), *stages)
        numbers, diverged, losses = np.arange(self.one.point.batch_size), [], []
        for number in range(steps):
            local = np.stack([(numbers * 3 + 7 * t + 11 * number) % 50 for t in range(len(rates))]).astype(np.int32)
            state, loss = self._step(state, stages, local)
            diverged.append(np.asarray(state.diverged))
            losses.append(np.asarray(loss))
        return jax.device_get(
            (state, np.array(diverged), np.array(losses), self._measure(state.params, state.batch_stats))
        )


def core(form, dtype="float32", **changes):
    fields = dict(model="resnet", width=2, depth=1, norm="batch", batch_size=8) | changes
    return Core(Config(**fields, compute_dtype=dtype), SHAPE, CLASSES, form)


CASES = [
    ("resnet", "batch", 1, [(3, 1), (3, 3), (6, 2), (6, 3)]),
    ("resnet", "batch", 2, [(5, 5)]),
    ("resnet", "batch", 3, [(3, 1)]),
    ("resnet", "layer", 1, [(5, 1), (3, 3)]),
    ("resnet", "none", 2, [(3, 3), (4, 2)]),
    ("mlp", "batch", 2, [(5, 1)]),
    ("mlp", "none", 3, [(3, 1)]),
    ("small", "batch", 1, [(3, 1), (4, 2), (3, 3)]),
]


@pytest.mark.parametrize(("model", "norm", "depth", "blocks"), CASES)
def test_packed_and_mapped_agree_in_float64_over_twenty_steps(model, norm, depth, blocks, register):
    """Draws bit for bit; parameters, statistics and losses within 1e-10, but what Adam makes of a zero gradient."""
    register(models.MODELS, "small", SMALL_NET)
    with jax.enable_x64(True):
        # Twelve layers down, single pixels of 8 examples make statistics so ill-conditioned (a loss of 17) that the
        # order of sums alone moves it by 1e-10 in 20 steps: the deepest net gets half of the examples a batch.
        fields = dict(model=model, norm=norm, depth=depth, batch_size=25 if depth == 3 else 8)
        for trials, group in blocks:
            found = []
            for form in (Form("mapped"), Form("packed", trials, group)):
                one = core(form, "float64", **fields)
                start = block_of(one, range(trials))
                _, _, losses, evaluated = Block(one).train(start, 20, [1e-3] * trials)
                found.append((start.params, losses, evaluated))
            for a, b in zip(jax.tree.leaves(found[0][0]), jax.tree.leaves(found[1][0]), strict=True):
                np.testing.assert_array_equal(a, b)
            for a, b in zip(jax.tree.leaves(found[0][1:]), jax.tree.leaves(found[1][1:]), strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)
            assert np.ptp(found[0][1][-1]) > 1e-3, "the trials of a block should differ"


def spoil_rate(state, rates):
    rates[1] = 1e6


def spoil(where, value):
    def change(state, rates):
        tree = state.batch_stats if where[0] == "batch_stats" else state.params
        for name in where[1:-1]:
            tree = tree[name]
        tree[where[-1]][1].reshape(-1)[0] = value

    return change


CONV, BLOCK = ("module_1", "conv", "kernel"), ("module_3", "block_1")
SPOILT = {
    "a learning rate of 1e6": spoil_rate,
    "NaN in the stem": spoil(("params", *CONV), np.nan),
    "infinity in the stem": spoil(("params", *CONV), np.inf),
    "NaN in a later convolution": spoil(("params", *BLOCK, "conv_2", "kernel"), np.nan),
    "NaN in a shortcut": spoil(("params", *BLOCK, "conv_shortcut", "kernel"), np.nan),
    "infinity in the head": spoil(("params", "module_6", "kernel"), np.inf),
    "NaN in the head's bias": spoil(("params", "module_6", "bias"), np.nan),
    "NaN in a scale": spoil(("params", *BLOCK, "norm_1", "scale"), np.nan),
    "infinity in a scale": spoil(("params", *BLOCK, "norm_1", "scale"), np.inf),
    "NaN in a bias": spoil(("params", *BLOCK, "norm_2", "bias"), np.nan),
    "infinity in a statistic": spoil(("batch_stats", *BLOCK, "norm_1", "mean"), np.inf),
    "infinity in a variance": spoil(("batch_stats", "module_1", "norm", "var"), np.inf),
}


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("group", [1, 3])
def test_one_bad_trial_leaves_its_block_as_it_was_and_is_marked_in_its_step(norm, dtype, group):
    """Its neighbours to the bit, over three steps and an evaluation, as with a healthy trial in its place."""
    one = core(Form("packed", 3, group), dtype, norm=norm)
    block, mapped = Block(one), Block(core(Form("mapped"), dtype, norm=norm))
    start, healthy = block_of(one, range(3)), [0.1, 0.1, 0.1]
    good, none, _, scores = block.train(start, 3, healthy)
    assert not none.any()
    for name, spoil_it in SPOILT.items():
        if ("statistic" in name or "variance" in name) and norm != "batch":
            continue
        if ("scale" in name or name == "NaN in a bias") and norm == "none":
            continue
        state, rates = jax.tree.map(np.copy, start), list(healthy)
        spoil_it(state, rates)
        bad, diverged, _, spoilt_scores = block.train(state, 3, rates)
        for before, after in zip(jax.tree.leaves((good, scores)), jax.tree.leaves((bad, spoilt_scores)), strict=True):
            np.testing.assert_array_equal(np.delete(before, 1, 0), np.delete(after, 1, 0), err_msg=name)
        _, alone, _, own_scores = mapped.train(state, 3, rates)
        assert (diverged == alone).all(), (name, diverged[:, 1], alone[:, 1])
        assert diverged[0, 1] or name == "a learning rate of 1e6", name
        # Its own evaluation hides nothing. (It tells of more: a ReLU makes 0 of minus infinity.)
        assert np.isfinite(own_scores[0][1]) or not np.isfinite(spoilt_scores[0][1]), name


def transposed(text):
    """Shapes of activations that are transposed in a lowered program: of five axes and more, with height and width."""
    found = re.findall(r"stablehlo\.transpose.*?-> tensor<([\dx]+)x(\w+)>", text)
    return [(shape, kind) for shape, kind in found if shape.count("x") >= 4 and f"x{SHAPE[0]}x" in f"x{shape}x"]


@pytest.mark.parametrize(("trials", "group"), [(4, 4), (4, 2), (4, 1)])
def test_nothing_but_the_input_is_transposed_and_convolutions_are_dense(trials, group):
    one = core(Form("packed", trials, group))
    state = block_of(one, range(trials))
    images, labels = np.zeros((trials, 8, *SHAPE), np.uint8), np.zeros((trials, 8), np.int32)
    given = state.params, state.batch_stats, images, labels
    gradients, mesh = jax.vmap(one.network.gradients), trial_axis.mesh(jax.devices()[:1])
    along = jax.sharding.PartitionSpec("trials")
    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=along, out_specs=along, check_vma=False)
    for function, arguments in ((gradients, given), (sharded, trial_axis.abstract(given, mesh))):
        text = jax.jit(function).lower(*arguments).as_text()
        moved = transposed(text)
        assert [kind for _, kind in moved] == ["ui8"] * (group > 1), moved
        convolutions = text.count("stablehlo.convolution")
        # Stem, four blocks of two and three shortcuts; each forwards and for its kernel, all but the stem for images.
        assert convolutions == trials // group * (3 * 12 - 1)
        assert not re.search(r"feature_group_count = (?!1 )\d+", text)


def test_a_new_network_needs_no_word_about_forms(register):
    """A file of under 40 lines, trained in every form; equal in float64."""
    assert len(Path(small_net.__file__).read_text().splitlines()) < 40
    register(models.MODELS, "small", SMALL_NET)
    with jax.enable_x64(True):
        study = tiny.study(warm_start_epochs=(0, 1), tuning_epochs=2, equal_updates=False, compute_dtype="float64")
        study = tiny.of_model(study, "small")
        tables = []
        forms = [Formulation("mapped", slots=4), Formulation("packed", 4, 1, 4), Formulation("packed", 4, 4, 4)]
        forms += [Formulation("products", slots=4)] + [Formulation("native", slots=4)] * library.available()
        for formulation in forms:
            (run,) = tiny.programs(study, formulation)
            while run.step():
                pass
            tables.append(tiny.table(study, [run]))
        for other in tables[1:]:
            for name in ("train_loss", "test_loss"):
                np.testing.assert_allclose(tables[0][name], other[name], rtol=0, atol=1e-10)


def test_no_network_knows_how_it_is_computed():
    """No kernels' name, no backend and nothing fused in the networks; `network.py` is the boundary itself."""
    words = {*kernels.KERNELS, "fused", "backend", "cpu", "gpu", "block_diagonal"}
    for file in sorted(MODELS.glob("*.py")):
        if file.name in ("network.py", "__init__.py"):
            continue
        tree = ast.parse(file.read_text())
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not {name for name in names if set(re.findall(r"\w+", name.lower())) & words}, file

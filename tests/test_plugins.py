"""A user's own models, optimisers, interventions and diagnostics: from a file, from Python, and what is refused."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import plastic_jax
from plastic_jax import data, models
from plastic_jax.errors import InputError
from plastic_jax.kernels import Form
from plastic_jax.methods.interventions import INTERVENTIONS
from plastic_jax.running import loading
from plastic_jax.study import plugins
from plastic_jax.study.config import FIELDS, Config, Sweep

ROOT = Path(__file__).parents[1]
IDEA = '''"""An idea of a user's own: a model of Flax's layers, an optimiser, an intervention, a diagnostic."""
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import plastic_jax as pj


@pj.register
class WeightClipping(pj.Intervention):
    """theta <- clip(theta, -bound, bound) after every update."""

    fields = {"clip": pj.Field(0.0, "dynamic", "weight clipping: bound of every weight; 0 = off", low=0.0, off=0.0),
              "clip_interval": pj.Field(1, "static", "weight clipping: updates between two", low=1)}

    def interval(self, point):
        return point.clip_interval

    def at_interval(self, view):
        clipped = jax.tree.map(lambda leaf: jnp.clip(leaf, -view.clip, view.clip), view.params)
        return pj.Trained(clipped, view.trained.batch_stats, view.trained.optimiser)


@pj.register
class LargestWeight(pj.Diagnostic):
    columns = (pj.Column("largest_weight", "largest absolute parameter"),)

    def measure(self, view):
        return {"largest_weight": jnp.stack([jnp.abs(leaf).max() for leaf in jax.tree.leaves(view.params)]).max()}


pj.register(pj.Optimiser(optax.scale_by_lion), "lion")


class Net(nn.Module):
    width: int
    classes: int

    @nn.compact
    def __call__(self, images, train):
        x = nn.Conv(self.width, (3, 3))(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        self.sow("units", "hidden", x)
        return nn.Dense(self.classes)(x.mean((1, 2)))


UNITS = (pj.Units(("net/hidden",), ("net/Conv_0",), ("net/Dense_0",), ("net/BatchNorm_0",)),)
pj.register(pj.Model(lambda point, classes: Net(point.width, classes), units=lambda _: UNITS, plain=True), "my_net")
'''


@pytest.fixture
def forgetting():
    """What is registered in a test is forgotten after it."""
    yield
    for found in list(plugins.REGISTERED):
        plugins.forget(found.name)
    plugins._loaded.clear()


def called(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "WANDB_MODE": "disabled", "PYTHONPATH": path}
    command = [sys.executable, "-m", "experiments.warm_start", "--wandb=disabled", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=cwd, env=env)


def test_a_file_takes_part_in_a_study(tmp_path):
    """Its model, optimiser, intervention and diagnostic: in table, summary, page, plan and config."""
    file = tmp_path / "my_idea.py"
    file.write_text(IDEA)
    arguments = [
        f"--plugin={file}", f"--workdir={tmp_path / 'run'}", "--config.model=my_net,mlp", "--config.optimizer=lion",
        "--config.width=4", "--config.depth=1", "--config.seeds=2", "--config.warm_start_epochs=(0,1)",
        "--config.tuning_epochs=2", "--config.metric_epochs=1", "--config.clip=(0,0.05)",
        "--config.equal_updates=False",
        "--config.diagnostics=largest_weight+dormant_units", "--config.redo_interval=4", "--config.learning_rate=0.001",
    ]  # fmt: skip
    done = called(*arguments)
    assert done.returncode == 0, done.stderr
    run = plastic_jax.load(tmp_path / "run")  # without the plug-in
    assert set(run.table.model) == {"my_net", "mlp"} and run.table.dormant_units.notna().all()
    largest, bound = run.table.largest_weight, run.table["clip"]
    assert largest[bound == 0.05].max() == pytest.approx(0.05) and largest[bound == 0].min() > 0.06
    assert all(row["largest_weight"] > 0 for row in run.summary) and len(run.summary) == 8
    assert "largest weight" in done.stdout and "largest weight" in (tmp_path / "run" / "report.html").read_text()
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert {name for p in plan["programs"] for name in p["interventions"]} == {"redo", "weight_clipping"}
    held = {found["name"]: found for found in run.config["plugins"]}
    assert set(held) == {"weight_clipping", "largest_weight", "lion", "my_net"}
    assert {found["sha256"] for found in held.values()} >= {hashlib.sha256(file.read_bytes()).hexdigest()}
    again = called(*arguments)
    assert again.returncode == 0 and "Compiling" not in again.stdout, again.stderr


TINY = dict(
    dataset="digits", train_examples=60, model="mlp", width=8, depth=1, batch_size=10, warm_start_epochs=(0, 2),
    tuning_epochs=3, metric_epochs=2, seeds=2,
)  # fmt: skip


def trained(folder: Path, said: list, **config) -> loading.Run:
    run = plastic_jax.run({**TINY, **config}, folder, say=said.append, wandb="disabled", progress=False)
    assert run is not None
    return run


def test_one_that_takes_no_part_is_not_needed_again(tmp_path, forgetting):
    file = tmp_path / "my_idea.py"
    file.write_text(IDEA)
    plugins.load([str(file)])
    run = trained(tmp_path / "run", [], diagnostics="largest_weight")
    assert [p["name"] for p in run.config["plugins"]] == ["largest_weight"] and "clip" not in run.config["config"]
    for _ in range(2):  # a value without effect is the run's all the same
        other = trained(tmp_path / "other", [], clip_interval=5)
    assert other.config["config"]["clip_interval"] == 5 and "clip" not in other.config["config"]
    for name in ("weight_clipping", "lion", "my_net"):
        plugins.forget(name)
    said: list[str] = []
    trained(tmp_path / "run", said, diagnostics="largest_weight")
    assert not any("other code" in text for text in said)
    with pytest.raises(InputError, match="diagnostics was 'largest_weight', is now 'none'"):
        trained(tmp_path / "run", [])


STRIPES = '''"""Images of one class have their stripe in one column."""
import numpy as np

import plastic_jax as pj


def split(seed, count):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 4, count)
    images = draw.integers(0, 100, (count, 4, 4, 1), np.uint8)
    images[np.arange(count), :, labels] = 255
    return images, labels


pj.register(pj.DataSource(60, 20, (4, 4, 1), 4, lambda _: (split(0, 60), split(1, 20))), "stripes")
'''


def test_a_data_set_of_ones_own_is_read_and_named(tmp_path):
    file = tmp_path / "stripes.py"
    file.write_text(STRIPES)
    arguments = [f"--plugin={file}", f"--workdir={tmp_path / 'run'}", "--config.dataset=stripes", "--config.width=32",
                 "--config.learning_rate=0.01",
                 "--config.train_examples=0", "--config.label_noise=0.", "--config.depth=1", "--config.batch_size=10",
                 "--config.seeds=2", "--config.warm_start_epochs=0,3", "--config.tuning_epochs=30",
                 "--config.metric_epochs=2"]  # fmt: skip
    done = called(*arguments)
    assert done.returncode == 0, done.stderr
    run = plastic_jax.load(tmp_path / "run")
    (held,) = run.config["plugins"]
    assert (held["kind"], held["name"]) == ("data set", "stripes")
    assert held["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert run.config["datasets"]["stripes"]["train_examples"] == 60 and run.summary[0]["test_accuracy"] > 0.9
    file.write_text(STRIPES.replace("split(0, 60)", "split(2, 60)"))
    again = called(*arguments)
    assert again.returncode == 2 and "run on other data" in again.stderr


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("split(0, 60)", "split(0, 59)", "train images (59, 4, 4, 1) instead of (60, 4, 4, 1)"),
        ("np.uint8)", "np.uint16)", "train images of uint16 instead of uint8"),
        ("return images, labels", "return images, labels + 1", "train labels outside 0 to 3"),
        ("return images, labels", "return images, labels / 1", "train labels of float64 instead of integers"),
        ("return images, labels", "return images, labels[1:]", "59 train labels instead of 60"),
        ("draw = ", "draw = open('/nowhere/x') or ", "/nowhere/x cannot be read"),
        ("draw = ", "draw = 1 / 0 or ", "cannot be read (ZeroDivisionError: division by zero)"),
    ],
)
def test_a_data_set_that_is_not_what_it_says_is_one_sentence(old, new, words, tmp_path, forgetting):
    file = tmp_path / "stripes.py"
    file.write_text(STRIPES.replace(old, new))
    plugins.load([str(file)])
    with pytest.raises(InputError) as error:
        data.load("stripes")
    assert words in str(error.value) and "stripes" in str(error.value)


def test_one_that_has_changed_since_is_said(tmp_path, forgetting):
    file = tmp_path / "my_idea.py"
    file.write_text(IDEA)
    plugins.load([str(file)])
    trained(tmp_path / "run", [], clip=0.5)
    for found in list(plugins.REGISTERED):
        plugins.forget(found.name)
    plugins._loaded.clear()
    file.write_text(IDEA.replace("jnp.clip(leaf, -view.clip, view.clip)", "leaf * 0"))
    plugins.load([str(file)])
    said: list[str] = []
    trained(tmp_path / "run", said, clip=0.5)
    (sentence,) = [text for text in said if "other code" in text]
    assert "numbers stay as they were" in sentence


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["idea.py is not allowed", "exists"]),
        ("import nothing_like_it", ["cannot be imported", "ModuleNotFoundError", "nothing_like_it"]),
        ("def broken(:", ["cannot be imported", "SyntaxError", "line 1"]),
        ("x = 1", ["registers nothing", "plastic_jax.register"]),
        (IDEA + "pj.register(pj.Optimiser(optax.identity), 'lion')\n", ["lion", "declared twice"]),
        (IDEA.replace('"clip":', '"width":').replace("view.clip", "view.width"), ["'width'", "exists already"]),
        (IDEA.replace('"largest_weight", "', '"test_loss", "'), ["'test_loss'", "exists already"]),
        (IDEA.replace("off=0.0", "high=1.0"), ["weight_clipping", "off"]),
        (IDEA.replace("def at_interval(", "def on_interval("), ["weight_clipping", "does nothing", "at_interval"]),
        (IDEA.replace("def measure(", "def measured("), ["LargestWeight", "does not define measure"]),
    ],
    ids=["missing", "import", "syntax", "nothing", "twice", "field", "column", "off", "no hook", "no measure"],
)
def test_what_cannot_take_part_is_one_sentence(text, words, tmp_path, forgetting):
    file = tmp_path / "idea.py"
    if text is not None:
        file.write_text(text)
    fields = set(FIELDS)
    with pytest.raises(InputError) as error:
        plugins.load([str(file)])
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)
    if "lion" not in words:
        assert "clip_interval" not in fields or set(FIELDS) >= fields


def test_it_is_refused_before_any_work_and_leaves_nothing(tmp_path):
    done = called(f"--plugin={tmp_path / 'idea.py'}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists()


def test_python_registers_too_and_dir_names_all(forgetting):
    class Halving(plastic_jax.Intervention):
        fields = {"halving": plastic_jax.Field(0.0, "dynamic", "halves", low=0.0, high=1.0, off=0.0)}

        def at_start(self, view):
            return view.trained

    assert plastic_jax.register(Halving) is Halving
    assert "halving" in INTERVENTIONS and Sweep.of({"halving": (0, 0.5)}).values["halving"] == (0.0, 0.5)
    assert Config().halving == 0.0 and plugins.REGISTERED[-1].file.endswith("test_plugins.py")
    with pytest.raises(InputError, match="declared twice"):
        plastic_jax.register(Halving)
    with pytest.raises(InputError, match="it is none of Intervention"):
        plastic_jax.register(3)
    plugins.forget("halving")
    assert "halving" not in FIELDS and "halving" not in INTERVENTIONS
    assert set(plastic_jax.__all__) <= set(dir(plastic_jax))
    assert all(getattr(plastic_jax, name) for name in plastic_jax.__all__)


class Plain(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, images, train):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(3, (3, 3))(images)))
        return nn.Dense(self.classes)(x.mean((1, 2)))


@pytest.mark.parametrize("form", [Form("mapped"), Form("packed", 3)], ids=str)
def test_a_plain_flax_module_computes_what_flax_does(form, forgetting):
    """Initialisation, statistics and gradients of each trial of a block, against the module alone."""
    plastic_jax.register(models.Model(lambda point, classes: Plain(classes), plain=True), "plain")
    network = models.network(Config(model="plain"), (6, 6, 1), 4, form)
    keys = jax.random.split(jax.random.key(0), 3)
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (3, 5, 6, 6, 1), np.uint8), draw.integers(0, 4, (3, 5))
    params, stats = jax.vmap(network.init)(keys)
    found = jax.jit(jax.vmap(network.gradients))(params, stats, jnp.asarray(images), jnp.asarray(labels))
    for trial in range(3):
        alone = Plain(4).init(keys[trial], jnp.zeros((1, 6, 6, 1)), train=False)
        own = jax.tree.map(lambda leaf, trial=trial: leaf[trial], (params, stats))
        jax.tree.map(np.testing.assert_array_equal, own[0]["net"], alone["params"])

        def loss(params, alone=alone, trial=trial):
            x = (images[trial] / 255 - 0.5) / 0.5
            variables = {"params": params, "batch_stats": alone["batch_stats"]}
            logits, new = Plain(4).apply(variables, jnp.asarray(x, jnp.float32), train=True, mutable=["batch_stats"])
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(labels[trial])[:, None], 1)
            return -chosen.mean(), new["batch_stats"]

        (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(alone["params"])
        np.testing.assert_allclose(found.loss[trial], value, rtol=1e-5)
        for a, b in ((found.gradients["net"], gradients), (found.batch_stats["net"], new)):
            jax.tree.map(lambda x, y, t=trial: np.testing.assert_allclose(x[t], y, rtol=1e-4, atol=1e-6), a, b)

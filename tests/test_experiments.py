"""Every experiment: presets, figures, and what the figures of figures 4-7 and 11 and of the online setting show."""

import importlib
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from scipy import stats
from synthetic import rows

import plastic_jax
from experiments.module_reset import PREFIXES, RESETS, SINGLETONS, SUFFIXES
from plastic_jax.report import arm_figures
from plastic_jax.results import estimates, pairing, summaries
from plastic_jax.results.settings import Setting

ROOT = Path(__file__).parents[1]
NAMES = sorted(p.stem for p in (ROOT / "experiments").glob("[a-z]*.py") if "EXPERIMENT = " in p.read_text())
FIGURES = {
    "warm_start": {"accuracy_curves", "gap"},
    "smooth_transition": {"gap", "accuracy"},
    "multi_stage": {"stages", "gap"},
    "capacity": {"gap", "accuracy"},
    "module_reset": {"reset", "speed"},
    "tuning_learning_rate": {"gap", "accuracy"},
    "online": {"online"},
}
# One width of the batches and, where it can be, one size of the network: the runs share their compiled programs.
TINY = dict(train_examples=100, batch_size=8, tuning_epochs=3, metric_epochs=1, seeds=3, trials_per_device=2)
TINIER = {
    "warm_start": dict(warm_start_epochs=(0, 2), width=8, depth=1),
    "smooth_transition": dict(gamma=(0.2, 0.8), width=8, depth=1),
    "multi_stage": dict(warm_start_epochs=2, width=8, depth=1, pretraining_stages=(0, 2), uniform_fraction=(1.0, 0.0)),
    "capacity": dict(warm_start_epochs=2, width=(4, 8), depth=1),
    "module_reset": dict(warm_start_epochs=2, width=8, reset=("none", "1", "6", "2-6")),
    "tuning_learning_rate": dict(warm_start_epochs=2, width=8, depth=1, tuning_learning_rate_factor=(1.0, 10.0)),
    "online": dict(width=8, depth=1, chunk_examples=30),
}


def experiment(name):
    return importlib.import_module(f"experiments.{name}").EXPERIMENT


def test_these_are_all_experiments():
    assert set(NAMES) == set(FIGURES) == set(TINIER)


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_point_is_short_and_says_what_it_costs(name):
    text = (ROOT / "experiments" / f"{name}.py").read_text()
    assert len(text.splitlines()) < 100
    doc = text.split('"""')[1]
    assert f"python -m experiments.{name} " in doc and "--preset=paper" in doc and "Expected (" in doc
    assert "two CPU cores, 2026-" in doc


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_of_an_experiment_can_be_planned(name, tmp_path):
    for preset, values in experiment(name).presets.items():
        said = []
        config = dict(values)
        options = dict(dry_run=True, device_memory_gib=80.0, say=said.append)
        assert plastic_jax.run(config, tmp_path / preset, study=experiment(name), **options) is None
        assert "Nothing was trained" in said[-1]
        assert ("estimates for classes of one size" in said[0]) == (name == "multi_stage")


@pytest.mark.parametrize("name", NAMES)
def test_a_small_quickstart_leaves_its_figures(name, tmp_path):
    config = {**experiment(name).presets["quickstart"], **TINY, **TINIER[name]}
    run = plastic_jax.run(
        config, tmp_path, study=experiment(name), wandb="disabled", progress=False, say=lambda _: None
    )
    assert run is not None and {f.stem for f in (tmp_path / "figures").glob("*.png")} == FIGURES[name]
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png") == len(FIGURES[name])
    fresh = [row for row in run.summary if row["gap"] is None]
    assert fresh and all(row["pairs"] == 3 for row in run.summary if row not in fresh)


def test_module_reset_names_every_prefix_suffix_and_singleton():
    sets = [tuple(range(a, b + 1)) for a in range(1, 7) for b in range(a, 7)]
    wanted = {s for s in sets if s[0] == 1 or s[-1] == 6 or len(s) == 1}
    named = {plastic_jax.study.config.reset_modules(name) for name in RESETS} - {()}
    assert named == wanted
    assert len(PREFIXES) == len(SUFFIXES) == len(SINGLETONS) == 6


# What the figures show.


def draw(canvas):
    FigureCanvasAgg(canvas).draw()
    return canvas.axes


def bars(axes):
    """Label -> (x, mean, low, high) of the lines with error bars."""
    found = {}
    for container in axes.containers:
        line, _, (bar,) = container.lines
        ends = np.array([segment[:, 1] for segment in bar.get_segments()])
        found[container.get_label()] = (line.get_xdata(), line.get_ydata(), ends[:, 0], ends[:, 1])
    return found


def arms_table(values, swept, fresh, metric_epochs=2):
    """A table of trials whose metric is known: arm values -> one metric a seed."""
    arms, made, trial = [], [], 0
    for key, metrics in values.items():
        arm = dict(zip(swept, key, strict=True))
        arm = {"arm": ", ".join(f"{n}={v}" for n, v in arm.items() if v is not None), **arm}
        arms.append(arm)
        for seed, value in enumerate(metrics):
            made += rows(trial, arm, seed, "tuning", [1, 2, 3], [0.0, value - 0.01, value + 0.01])
            trial += 1
    names = {key: arm["arm"] for key, arm in zip(values, arms, strict=True)}
    setting = Setting(swept, tuple(arms), {names[k]: names[fresh(k)] for k in values}, metric_epochs, False)
    return pd.DataFrame(made), setting


def test_accuracy_against_stages_begins_every_line_at_the_fresh_arm():
    values = {(0, None): [0.9, 0.8, 0.7]}
    values |= {(n, r): [0.9 - 0.1 * n * (2 - r), 0.7, 0.6] for n in (1, 2) for r in (1.0, 0.5)}
    table, setting = arms_table(values, ("pretraining_stages", "uniform_fraction"), lambda _: (0, None))
    panels = [
        arm_figures.Panel("pretraining_stages", "n", {"uniform_fraction": 1.0}),
        arm_figures.Panel("uniform_fraction", "r"),
    ]
    left, right = draw(arm_figures.accuracy_against(table, setting, panels, "title"))
    ((label, (x, mean, low, high)),) = bars(left).items()
    assert "uniform_fraction=1" in label and np.allclose(x, [0, 1, 2], atol=0.01)
    wanted = [np.array(values[key]) for key in ((0, None), (1, 1.0), (2, 1.0))]
    assert np.allclose(mean, [100 * v.mean() for v in wanted])
    t = stats.t.ppf(0.975, 2)
    half = [100 * t * v.std(ddof=1) / math.sqrt(3) for v in wanted]
    assert np.allclose(high - mean, half) and np.allclose(mean - low, half)
    lines = bars(right)
    assert sorted(lines) == ["pretraining_stages=1", "pretraining_stages=2"]
    assert np.allclose(lines["pretraining_stages=2"][1], [100 * np.mean(values[2, r]) for r in (0.5, 1.0)])
    level = next(line for line in right.lines if line.get_label() == "fresh")
    assert np.allclose(level.get_ydata(), 80)


def test_accuracy_against_a_field_tells_fresh_from_pretrained():
    values = {
        (f, w): [0.8 - 0.01 * f * bool(w), 0.7, 0.75] for f in (1.0, 10.0) for w in (0, 200)
    }  # factor, warm-start length
    table, setting = arms_table(values, ("tuning_learning_rate_factor", "warm_start_epochs"), lambda k: (k[0], 0))
    (axes,) = draw(
        arm_figures.accuracy_against(table, setting, [arm_figures.Panel("tuning_learning_rate_factor", "x")], "title")
    )
    lines = bars(axes)
    assert sorted(lines) == ["fresh", "pretrained for 200 epochs"]
    assert np.allclose(lines["fresh"][1], [75, 75])
    assert np.allclose(lines["pretrained for 200 epochs"][1], [100 * np.mean(values[f, 200]) for f in (1.0, 10.0)])


def reset_table(sets, seeds=8):
    swept = ("warm_start_epochs", "reset")
    values = {(0, None): [0.8 + 0.01 * s for s in range(seeds)]}
    values |= {(9, name): [0.78 + 0.01 * s + 0.001 * k for s in range(seeds)] for k, name in enumerate(sets)}
    return arms_table(values, swept, lambda _: (0, None))


def test_reset_gaps_stand_at_their_sets_of_modules():
    table, setting = reset_table(["none", "1", "2", "1-2"])
    groups = {"first": ("1", "1-2"), "single": ("1", "2", "3")}
    panels = draw(arm_figures.reset_gaps(table, summaries.summary(table, setting), setting, groups, "title"))
    ticks = [[t.get_text() for t in axes.get_xticklabels()] for axes in panels]
    assert ticks == [["1", "1-2"], ["1", "2"]]
    means = [[c.lines[0].get_ydata()[0] for c in axes.containers] for axes in panels]
    assert np.allclose(means, [[-1.9, -1.7], [-1.9, -1.8]])
    assert any(np.allclose(line.get_ydata(), -2.0) for line in panels[0].lines)


def test_resets_of_no_group_have_a_panel_of_their_own():
    table, setting = reset_table(["none", "1", "1+3", "2+5"])
    canvas = arm_figures.reset_gaps(table, summaries.summary(table, setting), setting, {"first": ("1", "1-2")}, "title")
    ticks = [[t.get_text() for t in axes.get_xticklabels()] for axes in draw(canvas)]
    assert ticks == [["1"], ["1+3", "2+5"]]


def test_resets_in_several_other_settings_are_figures_of_their_own():
    """No arm stands for another: each optimiser's resets and its own fresh arm."""
    swept = ("optimizer", "warm_start_epochs", "reset")
    values = {(o, 0, None): [0.8 + 0.01 * s for s in range(8)] for o in ("adam", "sgd")}
    gaps = {("adam", "none"): -0.04, ("adam", "6"): -0.03, ("sgd", "none"): -0.02, ("sgd", "6"): -0.01}
    values |= {(o, 9, name): [0.8 + gap + 0.01 * s for s in range(8)] for (o, name), gap in gaps.items()}
    table, setting = arms_table(values, swept, lambda key: (key[0], 0, None))
    drawn = experiment("module_reset").draw(table, summaries.summary(table, setting), setting, "digits")
    assert [name for name, _, _ in drawn] == ["reset", "speed", "reset_2", "speed_2"]
    for optimizer, (_, caption, canvas), (_, _, speed) in zip(("adam", "sgd"), drawn[::2], drawn[1::2], strict=True):
        panel = draw(canvas)[0]
        assert f"optimizer={optimizer}" in panel.get_title(loc="left") and f"optimizer={optimizer}" in caption
        assert np.allclose(panel.containers[0].lines[0].get_ydata(), 100 * gaps[optimizer, "6"])
        assert any(np.allclose(line.get_ydata(), 100 * gaps[optimizer, "none"]) for line in panel.lines)
        assert [t.get_text() for t in draw(speed)[0].get_xticklabels()] == ["fresh", "6", "nothing"]


@pytest.mark.parametrize("name", ["capacity", "tuning_learning_rate", "warm_start"])
@pytest.mark.parametrize("lengths", [(0, 200), (0, 50, 200), (0,)])
def test_a_sweep_of_one_size_or_rate_is_drawn_against_the_pretraining_epochs(name, lengths):
    values = {(length,): [0.8 - length / 1e4, 0.7, 0.75] for length in lengths}
    table, setting = arms_table(values, ("warm_start_epochs",), lambda _: (0,))
    for _, _, canvas in experiment(name).draw(table, summaries.summary(table, setting), setting, "digits"):
        draw(canvas)


def test_many_lines_stay_within_the_axes():
    """Eight lines beside one another at each width."""
    values = {
        (width, depth, warm): [0.8 - 0.01 * depth, 0.7, 0.75 - 1e-4 * warm]
        for width in (16, 32)
        for depth in (1, 2, 3, 4)
        for warm in (0, 350)
    }
    table, setting = arms_table(values, ("width", "depth", "warm_start_epochs"), lambda key: (*key[:2], 0))
    for _, _, canvas in experiment("capacity").draw(table, summaries.summary(table, setting), setting, "cifar10"):
        for axes in draw(canvas):
            low, high = axes.get_xlim()
            at = np.concatenate([container.lines[0].get_xdata() for container in axes.containers])
            assert len(at) >= 8 and low < at.min() and at.max() < high


def test_lines_of_several_lengths_can_be_told_apart():
    values = {(width, warm): [0.8, 0.7, 0.75 - 1e-4 * warm] for width in (8, 16) for warm in (0, 2, 4)}
    table, setting = arms_table(values, ("width", "warm_start_epochs"), lambda key: (key[0], 0))
    (axes,) = draw(arm_figures.accuracy_against(table, setting, [arm_figures.Panel("width", "w")], "title"))
    looks = {
        (line.get_color(), line.get_marker(), line.get_linestyle()) for line in (c.lines[0] for c in axes.containers)
    }
    assert len(looks) == len(axes.containers) == 3


def speed_table():
    """Fresh: 99 % at epochs 3..10 of 10; reset 1: seed s at 4 + s, of which those above 10 never."""
    swept = ("warm_start_epochs", "reset")
    values = {(0, None): [0.5] * 8, (9, "1"): [0.5] * 8}
    table, setting = arms_table(values, swept, lambda _: (0, None))
    made = []
    for (trial, arm, seed), own in table.groupby(["trial", "arm", "seed"]):
        reached = (3 if "reset" not in str(arm) else 6) + int(seed)
        for epoch in range(1, 11):
            row = own.iloc[-1].to_dict() | {"trial": trial, "epoch": float(epoch), "step": 10 * epoch}
            made.append(row | {"train_accuracy": 0.99 if epoch >= reached else 0.98})
    return pd.DataFrame(made), setting


def test_training_speed_is_the_first_epoch_at_that_accuracy_or_censored():
    table, _ = speed_table()
    found = pairing.epochs_to_accuracy(table, 0.99)
    fresh, reset = (found[found["arm"].str.contains("reset") == flag] for flag in (False, True))
    assert fresh.epochs.tolist() == [3, 4, 5, 6, 7, 8, 9, 10] and fresh.reached.all()
    assert reset.epochs.tolist() == [6, 7, 8, 9, 10, 10, 10, 10]
    assert reset.reached.tolist() == [True] * 5 + [False] * 3
    assert fresh.before.tolist() == [2, 3, 4, 5, 6, 7, 8, 9] and reset.before.tolist() == [5, 6, 7, 8, 9] + [10] * 3
    coarse = pairing.epochs_to_accuracy(table[(table.epoch % 3 == 0) | (table.epoch == 10)], 0.99)
    fresh = coarse[~coarse["arm"].str.contains("reset")]
    assert fresh.epochs.tolist() == [3, 6, 6, 6, 9, 9, 9, 10] and fresh.before.tolist() == [0, 3, 3, 3, 6, 6, 6, 9]
    table.loc[table.trial == 0, "diverged"] = True
    assert 0 not in set(pairing.epochs_to_accuracy(table, 0.99).trial)


def test_training_speed_draws_medians_and_marks_what_is_censored():
    table, setting = speed_table()
    (axes,) = draw(arm_figures.training_speed(table, setting, ("1",), "title"))
    medians = [c.lines[0].get_ydata()[0] for c in axes.containers]
    assert medians == [6.5, 9.5]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["fresh", "1"]
    triangles = [line for line in axes.lines if line.get_marker() == "^"]
    assert len(triangles) == 1 and triangles[0].get_ydata() == [10]


def test_the_medians_interval_covers_what_it_says():
    random = np.random.default_rng(0)
    assert estimates.median_interval(np.arange(5.0)) is None
    assert estimates.median_interval(np.arange(6.0)) == [0, 5]
    for count in (6, 11, 16, 25):
        hits = 0
        for _ in range(2000):
            low, high = estimates.median_interval(random.exponential(size=count)) or (math.nan,) * 2
            hits += low <= math.log(2) <= high
        assert hits / 2000 >= 0.94


def test_online_curves_show_each_stage_at_its_data_sets_size():
    arms = ({"arm": "intervention=reinitialise"}, {"arm": "intervention=none"})
    arms = tuple({**arm, "intervention": arm["arm"].partition("=")[2]} for arm in arms)
    made = []
    for k, arm in enumerate(arms):
        for seed in range(4):
            seen = 0
            for stage, size in (("chunk_1", 400), ("chunk_2", 800), ("tuning", 1000)):
                epochs = 2 + seed  # stages end by accuracy, at the trial's own epoch
                accuracy = size / 2000 + 0.01 * seed - 0.02 * k * (size > 400)
                made += rows(4 * k + seed, arm, seed, stage, [epochs], [accuracy], size=size, start=seen)
                seen += size * epochs
    table = pd.DataFrame(made)
    setting = Setting(("intervention",), arms, dict.fromkeys([a["arm"] for a in arms], arms[0]["arm"]), 1, False)
    assert arm_figures.chunk_ends(table).available.tolist() == [400, 800, 1000] * 8
    curves, gaps = draw(arm_figures.online_curves(table, setting, "title"))
    fresh, warm = (c.lines[0].get_ydata() for c in curves.containers)
    assert np.allclose(fresh, [21.5, 41.5, 51.5]) and np.allclose(warm, [21.5, 39.5, 49.5])
    assert np.allclose(gaps.containers[0].lines[0].get_ydata(), [0, -2, -2])
    assert np.allclose(gaps.containers[0].lines[0].get_xdata(), [400, 800, 1000])

"""Figures, the terminal table and the page: what they show is what the table says."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from report_sweep import made
from synthetic import pair_table, rows, two_arms

from plastic_jax.report import page, style
from plastic_jax.results import estimates, pairing, summaries
from plastic_jax.results.settings import Setting


@pytest.fixture(scope="module")
def sweep():
    return made()


def part(sweep, optimizers: tuple[str, ...]) -> tuple[pd.DataFrame, list[dict], Setting]:
    table, _, whole = sweep
    arms = tuple(arm for arm in whole.arms if arm["optimizer"] in optimizers)
    fresh = {arm["arm"]: whole.fresh[arm["arm"]] for arm in arms}
    setting = Setting(whole.swept, arms, fresh, whole.metric_epochs, whole.equal_updates)
    table = table[table["optimizer"].isin(optimizers)]
    return table, summaries.summary(table, setting), setting


# Figures


def test_importing_is_light_and_drawing_leaves_pyplot_alone():
    code = """if True:
        import sys
        import plastic_jax.report.page as report
        from synthetic import pair_table, two_arms
        heavy = ("matplotlib", "jinja2", "scipy", "jax")
        print([name for name in heavy if name in sys.modules])
        report.accuracy_curves(pair_table([0.8], [0.7]), two_arms(), "title")
        print("matplotlib.pyplot" in sys.modules)
    """
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "tests")])
    shown = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert shown.stdout.split("\n") == ["[]", "False", ""]


def test_png_depends_on_the_data_alone(sweep, tmp_path):
    import matplotlib

    table, summary, setting = sweep

    def draw(folder: str, table: pd.DataFrame) -> list[bytes]:
        curves = page.accuracy_curves(table, setting, "title")
        gaps = page.gap_curve(table, summary, setting)
        made = [
            page.save_figure(canvas, tmp_path / folder, name, "caption")
            for canvas, name in ((curves, "curves"), (gaps, "gaps"))
        ]
        assert made[0].path == tmp_path / folder / "figures" / "curves.png"
        return [figure.path.read_bytes() for figure in made]

    expected = draw("a", table)
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 20, "savefig.dpi": 30}):
        assert draw("b", table.sample(frac=1, random_state=0)) == expected
        assert matplotlib.rcParams["font.size"] == 20
    for content in expected:
        assert content.startswith(b"\x89PNG")
        assert not re.search(b"tEXt|iTXt|tIME", content)
    table = table.assign(test_accuracy=table["test_accuracy"] - 0.1)
    assert draw("c", table)[0] != expected[0]


def lines_of(axes) -> list[np.ndarray]:
    return [np.array(line.get_xydata(), dtype=float) for line in axes.get_lines()]


def test_accuracy_curves_align_the_tuning_stages(sweep):
    table, _, setting = part(sweep, ("adam",))
    curves, dots = page.accuracy_curves(table, setting, "Fresh\n300 digits").axes
    longest = table[table["warm_start_epochs"] == 40]
    expected = 100 * longest.groupby(["stage", "epoch"])["test_accuracy"].mean()
    drawn = lines_of(curves)

    def line(stage: str, values: pd.Series) -> np.ndarray:
        """The drawn line with these heights, its x."""
        found = [d for d in drawn if len(d) == len(values) and np.allclose(d[:, 1], values)]
        assert len(found) == 1, stage
        return found[0][:, 0]

    # 40 epochs of half the data are 20 passes over all of it
    x = line("pretraining", expected["pretraining"])
    np.testing.assert_allclose(x, np.arange(1, 41) / 2 - 20)
    np.testing.assert_allclose(line("tuning", expected["tuning"]), np.arange(1, 31))
    fresh = table[table["warm_start_epochs"] == 0]
    expected = 100 * fresh.groupby(["stage", "epoch"])["test_accuracy"].mean()
    np.testing.assert_allclose(line("tuning", expected["tuning"]), np.arange(1, 31))
    x = line("tuning_continued", expected["tuning_continued"])
    np.testing.assert_allclose(x, np.arange(31, 51))
    labels = [tick.get_text() for tick in dots.get_xticklabels()]
    assert len(labels) == 3 and labels[0] == "fresh"
    title = ["Fresh", "300 digits, optimizer=adam", "5 seeds; mean and 95 % interval"]
    assert curves.get_title(loc="left").split("\n") == title


def test_accuracy_curves_band_is_the_t_interval():
    table = pair_table([0.80, 0.82, 0.84], [0.7, 0.7, 0.7])
    curves, _ = page.accuracy_curves(table, two_arms(), "digits").axes
    low, high = 100 * np.array(estimates.t_interval(np.array([0.81, 0.83, 0.85])))
    heights = np.concatenate([band.get_paths()[0].vertices[:, 1] for band in curves.collections])
    assert np.isclose(heights, low).any() and np.isclose(heights, high).any()


def test_accuracy_curves_leave_out_diverged_and_unfinished_trials():
    fresh, warm = two_arms().arms
    table = pair_table([0.8, 0.9], [0.7, 0.6])
    bad = rows(8, fresh, 8, "tuning", [1, 2, 3], [0.1, 0.1, 0.1], diverged=True)
    bad += rows(9, warm, 8, "tuning", [1, 2, 3], [0.1, 0.1, 0.1], fit=None)
    both = [
        lines_of(page.accuracy_curves(t, two_arms(), "digits").axes[0])
        for t in (table, pd.concat([table, pd.DataFrame(bad)]))
    ]
    assert all(np.array_equal(a, b) for a, b in zip(*both, strict=True))
    nothing = page.accuracy_curves(table.iloc[:0], two_arms(), "digits").axes[0]
    assert "0 seeds" in nothing.get_title(loc="left")


def test_curves_of_stages_that_end_at_different_epochs_stop_with_the_first():
    """A mean over fewer and fewer seeds would be a mean over the slow ones."""
    _, warm = two_arms().arms
    table = pair_table([0.8, 0.8], [0.7, 0.7])
    slow = pd.DataFrame(rows(3, warm, 1, "pretraining", [2, 4, 6], [0.3, 0.5, 0.9], size=500))
    later = (table["trial"] == 3) & (table["stage"] == "tuning")
    table.loc[later, "examples_seen"] += 1000
    table.loc[later, "step"] += 10
    table = pd.concat([table[~((table["trial"] == 3) & (table["stage"] == "pretraining"))], slow])
    drawn = lines_of(page.accuracy_curves(table, two_arms(), "digits").axes[0])
    (pretraining,) = (d for d in drawn if len(d) == 2 and np.allclose(d[:, 1], [30, 50]))
    np.testing.assert_allclose(pretraining[:, 0], [-1.5, -0.5])  # means of -1, -2 and 0, -1
    assert any(np.allclose(d[:, 0], [1, 2, 3]) for d in drawn if len(d) == 3)


def test_gap_curve_shows_the_summary(sweep):
    table, summary, setting = part(sweep, ("adam", "rmsprop"))
    (axes,) = page.gap_curve(table, summary, setting, title="Gap").axes
    drawn = lines_of(axes)
    colours = {}
    for column in ("gap", "gap_equal_updates"):
        for optimizer in ("adam", "rmsprop"):
            chosen = [r for r in summary if r["optimizer"] == optimizer and r["gap"] is not None]
            gaps = [100 * row[column] for row in chosen]
            found = [
                line
                for line, xy in zip(axes.get_lines(), drawn, strict=True)
                if len(xy) == 3 and np.allclose(xy[:, 1], gaps)
            ]
            assert found, (column, optimizer)
            colours[column, optimizer] = found[0].get_color()
            ends = [[100 * bound for bound in row[f"{column}_ci95"]] for row in chosen]
            bars = [c.get_segments() for c in axes.collections if hasattr(c, "get_segments")]
            assert any(np.allclose([b[:, 1] for b in bar], ends) for bar in bars if len(bar) == 3)
    assert colours["gap", "adam"] == colours["gap_equal_updates", "adam"]
    assert colours["gap", "adam"] != colours["gap", "rmsprop"]
    seeds = [c.get_offsets()[:, 1] for c in axes.collections if c.get_offsets().shape[0] == 5]
    metrics = pairing.trial_metrics(table, setting)
    paired = pairing.pairs(table, setting, metrics, "optimizer=adam, warm_start_epochs=40")
    gaps = 100 * (paired["arm"] - paired["fresh"])
    assert any(np.allclose(points, gaps) for points in seeds)
    assert axes.get_ylabel() == "generalisation gap, percentage points"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "10", "40"]
    assert "log scale" in axes.get_xlabel()
    assert "5 paired seeds" in axes.get_title(loc="left")


def test_gap_curve_of_many_lines_has_a_panel_for_equal_updates(sweep):
    table, summary, setting = sweep
    canvas = page.gap_curve(table, summary, setting)
    left, right = canvas.axes
    adam = [row for row in summary if row["optimizer"] == "adam"][1:]
    gaps = [100 * row["gap_equal_updates"] for row in adam]
    assert any(len(d) == 3 and np.allclose(d[:, 1], gaps) for d in lines_of(right))
    assert not any(len(d) == 3 and np.allclose(d[:, 1], gaps) for d in lines_of(left))
    # sgd does not fit after 40 epochs: a cross at its gap, and only there
    crosses = [line.get_ydata() for line in left.get_lines() if line.get_marker() == "x"]
    expected = next(row["gap"] for row in summary if row["verdict"] == "not fitted")
    np.testing.assert_allclose(np.concatenate(crosses), [100 * expected])
    labels = [text.get_text() for text in canvas.legends[0].get_texts()]
    assert labels == ["adam", "rmsprop", "sgd", "no verdict"]


def test_a_legend_of_long_names_lies_within_the_figure():
    arms = []
    for schedule, noise, epochs in itertools.product(("constant", "cosine"), (0.0, 0.2), (0, 100)):
        name = f"schedule={schedule}, label_noise={noise}, warm_start_epochs={epochs}"
        arms.append({"arm": name, "schedule": schedule, "label_noise": noise, "warm_start_epochs": epochs})
    fresh = {arm["arm"]: arms[k - k % 2]["arm"] for k, arm in enumerate(arms)}
    setting = Setting(("schedule", "label_noise", "warm_start_epochs"), tuple(arms), fresh, 1, False)
    made = []
    for index, arm in enumerate(arms):
        for seed in range(3):
            made += rows(3 * index + seed, arm, seed, "tuning", [1], [0.8 - 0.01 * index])
    table = pd.DataFrame(made)
    canvas = page.gap_curve(table, summaries.summary(table, setting), setting)
    FigureCanvasAgg(canvas).draw()
    box = canvas.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= canvas.bbox.x1


def test_gap_curve_against_names_joins_nothing():
    names = ("1", "1-2", "head")
    arms = ({"arm": "fresh", "reset": None}, *({"arm": n, "reset": n} for n in names))
    setting = Setting(("reset",), arms, dict.fromkeys(("fresh", *names), "fresh"), 1, False)
    made = []
    for index, arm in enumerate(arms):
        for seed in range(3):
            made += rows(3 * index + seed, arm, seed, "tuning", [1], [0.8 - 0.01 * index])
    table = pd.DataFrame(made)
    canvas = page.gap_curve(table, summaries.summary(table, setting), setting, x="reset")
    (axes,) = canvas.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == list(names)
    joined = [line for line in axes.get_lines() if len(line.get_xdata()) == 3]
    assert joined and all(line.get_linestyle() == "None" for line in joined)
    with pytest.raises(ValueError, match="'width' is not a swept field; swept are reset"):
        page.gap_curve(table, [], setting, x="width")


@pytest.mark.parametrize(
    ("values", "expected", "logarithmic"),
    [
        ([1, 10, 100], {1: 0, 10: 1, 100: 2}, True),
        ([100, 0, 1], {0: -0.5, 1: 0, 100: 2}, True),
        ([0.5, 0.1, 0.9], {0.1: 0.1, 0.5: 0.5, 0.9: 0.9}, False),
        ([0, 1, 2], {0: 0, 1: 1, 2: 2}, False),
        (["b", "a"], {"b": 0, "a": 1}, False),
        ([False, True], {False: 0, True: 1}, False),
        ([], {}, False),
    ],
)
def test_places_on_the_axis(values, expected, logarithmic):
    place, is_log = style.places(values)
    assert place == pytest.approx(expected) and is_log is logarithmic

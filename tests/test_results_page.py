"""Pages of results that a command writes from workdirs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import plastic_jax
from experiments import online, warm_start
from plastic_jax import results_page

ROOT = Path(__file__).parents[1]
CONFIG = dict(
    dataset="digits", train_examples=60, model="mlp", width=8, depth=1, norm="none", batch_size=10,
    tuning_epochs=4, metric_epochs=2, seeds=3, first_seed=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    for study, own in (
        (warm_start.EXPERIMENT, {"warm_start_epochs": (0, 5), "label_noise": (0.0, 0.2)}),
        (online.EXPERIMENT, {"chunk_examples": 30, "intervention": ("none", "reinitialise")}),
    ):
        quiet = dict(wandb="disabled", progress=False, say=lambda text: None)
        command = f"python -m experiments.{study.name} --config.seeds=3"
        plastic_jax.run({**CONFIG, **own}, folder / study.name, study=study, command=command, **quiet)
    return [folder / "warm_start", folder / "online"]


def call(*arguments: object) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "plastic_jax.results_page", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    return done.returncode, done.stdout, done.stderr


def table(page: str, heading: str) -> list[dict[str, str]]:
    """The rows of the first table under a heading."""
    lines = page.partition(f"## {heading}")[2].splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith("|"))
    end = next(k for k, line in enumerate(lines[start:], start) if not line.startswith("|"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end]]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def estimate(row: dict, name: str) -> str:
    low, high = row[f"{name}_ci95"]
    return f"{100 * row[name]:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def test_a_page_says_what_the_workdirs_say(runs, tmp_path):
    out = tmp_path / "pages" / "both.md"
    code, said, err = call(*runs, f"--out={out}")
    assert (code, said, err) == (0, f"Written: {out}\n", "")
    page = out.read_text()
    assert page.startswith(results_page.MARK)
    for k, path in enumerate(runs, start=1):
        held = json.loads((path / "config.json").read_text())
        part = page.partition(f"## {path.name}: mlp on digits\n")[2].partition("\n## ")[0]
        assert f"```bash\n{held['command']}\n```" in part
        assert f"{held['date']}, {held['device']}, commit {held['commit']}, JAX {held['versions']['jax']}" in part
        assert "; seeds 5 to 7." in part
        figures = sorted((path / "figures").glob("*.png"))
        assert figures and part.count("![") == len(figures)
        for figure in figures:
            assert f"](both_{k}_{figure.name})" in part
            assert (out.parent / f"both_{k}_{figure.name}").read_bytes() == figure.read_bytes()


def test_the_gap_table_is_the_summary(runs, tmp_path):
    assert results_page.main([*map(str, runs), f"--out={tmp_path / 'both.md'}"]) == 0
    page = (tmp_path / "both.md").read_text()
    for path in runs:
        summary = json.loads((path / "summary.json").read_text())
        rows = table(page, f"{path.name}: mlp on digits")
        assert len(rows) == len(summary)
        for row, arm in zip(rows, summary, strict=True):
            assert row["test %"] == f"{100 * arm['test_accuracy']:.2f}"
            assert row["fit %"] == f"{100 * arm['fit_accuracy']:.1f}"
            if fresh := arm["gap"] is None:
                assert row["pairs"] == row["gap [95 %]"] == "-" and row["verdict"] == "fresh"
            else:
                assert row["pairs"] == str(arm["pairs"]) == "3"
                assert row["gap [95 %]"] == estimate(arm, "gap") and row["verdict"] == arm["verdict"]
            if path.name == "warm_start":
                assert float(row["warm start epochs"]) == arm["warm_start_epochs"]
                assert float(row["label noise"]) == arm["label_noise"]
            else:
                assert row["intervention"] == arm["intervention"]
            assert row["at equal updates [95 %]"] == ("-" if fresh else estimate(arm, "gap_equal_updates"))


def test_verdicts_are_those_of_the_claims(runs, tmp_path):
    assert results_page.main([*map(str, runs), f"--out={tmp_path / 'both.md'}"]) == 0
    own = (tmp_path / "both.md").read_text().partition("## Verdicts on the claims")[2]
    command = [sys.executable, "-m", "experiments.claims", *map(str, runs), f"--out={tmp_path / 'claims'}"]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    judged = (tmp_path / "claims" / "claims.md").read_text()
    assert judged.startswith("| verdict |") and judged.strip() in own


def test_a_page_is_written_again_and_another_file_is_not(runs, tmp_path):
    out = tmp_path / "page.md"
    again = [str(runs[0]), f"--out={out}"]
    assert results_page.main(again) == 0
    first = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(first) == 3 and results_page.main(again) == 0
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == first

    for name, text in (("hand.md", "# Mine\n"), ("other_1_gap.png", "mine")):
        (tmp_path / name).write_text(text)
    for out, words in (("hand.md", "not a page that this command wrote"), ("other.md", "would overwrite")):
        code, said, err = call(runs[0], f"--out={tmp_path / out}")
        assert code == 2 and said == "" and words in err and len(err.splitlines()) == 1
    assert (tmp_path / "hand.md").read_text() == "# Mine\n" and (tmp_path / "other_1_gap.png").read_text() == "mine"
    assert {file.name for file in tmp_path.iterdir()} == {*first, "hand.md", "other_1_gap.png"}


def test_bad_input_is_one_sentence_and_writes_nothing(runs, tmp_path, capsys):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(runs[0], unfinished, ignore=shutil.ignore_patterns("checkpoints"))
    (unfinished / "summary.json").unlink()
    folder, file = tmp_path / "folder.md", tmp_path / "file"
    folder.mkdir()
    file.write_text("")
    before = sorted(tmp_path.rglob("*"))
    page = tmp_path / "page.md"
    for workdirs, out, words in (
        ([runs[0], unfinished], page, "is not a finished run"),
        ([tmp_path / "nowhere"], page, "is no workdir of a run"),
        ([runs[0], f"{runs[0]}/../{runs[0].name}"], page, "is named twice"),
        ([runs[0]], tmp_path / "page.txt", "must end in .md"),
        ([runs[0]], folder, "not a page that this command wrote"),
        ([runs[0]], file / "page.md", "cannot be written"),
    ):
        assert results_page.main([*map(str, workdirs), f"--out={out}"]) == 2
        said, err = capsys.readouterr()
        assert said == "" and words in err and len(err.splitlines()) == 1, err
        assert sorted(tmp_path.rglob("*")) == before

"""The command `python -m experiments.claims`: a real run, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import plastic_jax
from experiments import claims as command
from experiments import warm_start
from plastic_jax.claims import evidence, rules
from plastic_jax.errors import InputError
from plastic_jax.results import tables
from plastic_jax.running import experiment

# The command


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "warm"
    config = dict(
        dataset="digits", train_examples=60, model="mlp", width=8, depth=1, norm="none", batch_size=10,
        warm_start_epochs=(0, 5), tuning_epochs=4, metric_epochs=2, seeds=3,
    )  # fmt: skip
    plastic_jax.run(config, path, study=warm_start.EXPERIMENT, wandb="disabled", progress=False, say=lambda text: None)
    return path


def call(*arguments: object) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "experiments.claims", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    return done.returncode, done.stdout, done.stderr


def test_a_real_run_from_the_command_line(finished, tmp_path):
    code, out, err = call(finished, f"--out={tmp_path / 'out'}")
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "claims.json").read_text())
    assert {row["claim"] for row in found["rows"]} == {"warm-below-fresh", "both-fit", "early-gap"}
    assert all(row["pairs"] == 3 and row["scope"] == "other" and row["model"] == "mlp" for row in found["rows"])
    own = {row["claim"]: row for row in found["rows"]}["warm-below-fresh"]
    gap = plastic_jax.load(finished).summary[1]
    assert own["effect"] == pytest.approx(gap["gap"]) and own["effect_ci95"] == pytest.approx(gap["gap_ci95"])
    assert own["equal_updates"] == pytest.approx(gap["gap_equal_updates"])
    assert own["verdict"] == "not fitted" and gap["verdict"] == "not fitted"
    assert found["rules"] == rules.__doc__
    assert "warm-below-fresh" in out and str(tmp_path / "out" / "claims.md") in out
    assert "| claim |" in (tmp_path / "out" / "claims.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "no workdir is named"), (["nowhere"], "is no workdir"), (["--aut=x"], "Unknown command line flag")],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, words):
    code, out, err = call(*arguments)
    assert code == 2 and "Traceback" not in err and out == ""
    assert err.startswith("error: ") and words in err.splitlines()[0]


def changed(finished: Path, to: Path, **config: object) -> str:
    """A copy of the run's files, with other values in config.json; None removes one."""
    to.mkdir()
    for name in ("config.json", "summary.json", "results.parquet"):
        (to / name).write_bytes((finished / name).read_bytes())
    held = {**json.loads((to / "config.json").read_text()), **config}
    (to / "config.json").write_text(json.dumps({name: value for name, value in held.items() if value is not None}))
    return str(to)


def refused(words: str, *workdirs: object, out: object = "unused") -> None:
    with pytest.raises(InputError, match=words):
        command.judge([str(path) for path in workdirs], str(out))


def test_runs_that_cannot_be_judged_are_refused(finished, tmp_path):
    refused("named twice", finished, f"{finished}/../{finished.name}")
    refused("both judge the claim.*find the same", finished, changed(finished, tmp_path / "copy"))
    refused("unknown experiment, 'cold_start'", changed(finished, tmp_path / "cold", experiment="cold_start"))
    refused("unknown experiment, 'claims'", changed(finished, tmp_path / "claims", experiment="claims"))
    refused("unknown experiment, '../x'", changed(finished, tmp_path / "up", experiment="../x"))
    refused("config.json is missing, damaged or unreadable", changed(finished, tmp_path / "old", datasets=None))
    config = json.loads((finished / "config.json").read_text())["config"]
    refused("color is no field", changed(finished, tmp_path / "color", config={**config, "color": 1}))
    refused("it has other trials", changed(finished, tmp_path / "more", config={**config, "seeds": 4}))


def test_unfinished_and_damaged_runs_are_refused(finished, tmp_path):
    without = Path(changed(finished, tmp_path / "without"))
    (without / "summary.json").unlink()
    refused("not a finished run: it has no summary", without)
    short = Path(changed(finished, tmp_path / "short"))
    table = plastic_jax.load(finished).table
    tables.write(table[table["trial"] != 4], short / "results.parquet", ["warm_start_epochs"])
    refused("not a finished run: 1 of its 6 trials", short)
    other = Path(changed(finished, tmp_path / "other"))
    table = table.assign(test_accuracy=table["test_accuracy"] ** 2)
    tables.write(table, other / "results.parquet", ["warm_start_epochs"])
    refused("does not agree with results.parquet", other)
    (other / "results.parquet").write_bytes(b"no table")
    refused("no readable results table", other)
    (other / "config.json").write_text("{")
    refused("damaged or unreadable", other)


def test_a_folder_that_cannot_be_written_is_refused(finished, tmp_path):
    (tmp_path / "file").write_text("")
    refused("--out=.* cannot be written", finished, out=tmp_path / "file")


def test_the_papers_values_are_the_presets():
    found = evidence.paper_values(experiment.Experiment(presets={"paper": {"warm_start_epochs": (0, 10)}}))
    assert (
        found["warm_start_epochs"] == (0, 10) and found["dataset"] == ("cifar10",) and found["metric_epochs"] == (100,)
    )

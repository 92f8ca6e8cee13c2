"""Workdirs of an earlier version (commit 77d88ee): read, reported, or refused without loss.

`fixtures/earlier/*.zip` are its own: a ResNet on digits that had finished, with `logits.npy`, what it made of the first
six test images at each trial's end; and an MLP that was interrupted. Figures and reports were left out.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import plastic_jax
from plastic_jax import data

FIXTURES = Path(__file__).parent / "fixtures" / "earlier"
FINISHED = (
    "--config.model=resnet --config.width=2 --config.depth=1 --config.norm=batch --config.initialisation=pytorch "
    "--config.seeds=1 --config.warm_start_epochs=(0,1) --config.tuning_epochs=2 --config.metric_epochs=1 "
    "--config.keep=ends --config.kernels=products"  # --config.convolution=products, then
)
UNFINISHED = (
    "--config.width=4 --config.depth=1 --config.seeds=1 --config.warm_start_epochs=(0,1) --config.tuning_epochs=900000 "
    "--config.metric_epochs=1"
)


def unpacked(name: str, folder: Path) -> Path:
    shutil.unpack_archive(FIXTURES / f"{name}.zip", folder / name)
    return folder / name


def called(arguments: str, workdir: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.warm_start", *arguments.split(), f"--workdir={workdir}"]
    where = dict(cwd=Path(__file__).parents[1], env={**os.environ, "WANDB_MODE": "disabled"})
    return subprocess.run([*command, "--wandb=disabled"], capture_output=True, text=True, timeout=250, **where)


def fingerprint(folder: Path) -> dict[str, str]:
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != ".lock"]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_its_models_give_the_logits_that_they_gave(tmp_path):
    run = plastic_jax.load(unpacked("finished", tmp_path))
    images = data.load("digits").test_images[:6]
    for trial, logits in enumerate(np.load(run.path / "logits.npy")):
        # Another kind of CPU sums in another order: the last bits of a float32 are its own.
        np.testing.assert_allclose(run.model(trial).logits(images), logits, atol=2e-7)
    assert set(run.table.stage) == {"pretraining", "tuning"} and len(run.summary) == 2


def test_a_finished_one_is_reported_and_trains_nothing(tmp_path):
    folder = unpacked("finished", tmp_path)
    table = (folder / "results.parquet").read_bytes()
    done = called(FINISHED, folder)
    assert done.returncode == 0, done.stderr
    assert "Compiling" not in done.stdout and (folder / "report.html").exists()
    assert (folder / "results.parquet").read_bytes() == table


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("unfinished", UNFINISHED, ["unfinished run of other code", "77d88ee", "name another folder"]),
        ("finished", FINISHED + " --config.kernels=mapped", ["another config", "kernels was 'products'"]),
        ("finished", FINISHED + " --config.convolution=products", ["--config.convolution", "kernels"]),
        ("finished", FINISHED + " --config.trial_axis=map", ["--config.trial_axis", "kernels"]),
    ],
)
def test_what_cannot_go_on_is_refused_in_a_sentence_and_nothing_is_lost(name, arguments, words, tmp_path):
    folder = unpacked(name, tmp_path)
    before = fingerprint(folder)
    done = called(arguments, folder)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert "--overwrite" not in done.stderr or name == "finished"
    assert fingerprint(folder) == before

"""The command line as a user meets it: one sentence and exit code 2 for bad input, nothing computed is lost."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from plastic_jax.results.tables import read

SMALL = [
    "--config.train_examples=60", "--config.width=8", "--config.depth=1", "--config.batch_size=10",
    "--config.warm_start_epochs=(0, 2, 4)", "--config.tuning_epochs=6", "--config.metric_epochs=2",
    "--config.seeds=3", "--wandb=disabled",
]  # fmt: skip


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Compiled programs shared by this module's processes."""
    return {**os.environ, "PLASTIC_JAX_CACHE": str(tmp_path_factory.mktemp("cache")), "JAX_PLATFORMS": "cpu"}


def start(arguments, environment, **more):
    command = [sys.executable, "-m", "experiments.warm_start", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def call(arguments, environment):
    process = start(arguments, environment)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def refused(arguments, environment, *words):
    """Exit code 2 and one sentence, on the last line of stderr, with all of `words`."""
    code, out, err = call(arguments, environment)
    assert code == 2, (code, out, err)
    assert "Traceback" not in err
    sentence = err.strip().splitlines()[-1]
    assert sentence.startswith("error: ")
    for word in words:
        assert word in sentence, sentence


@pytest.fixture(scope="module")
def finished(tmp_path_factory, environment):
    """A run left alone."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    code, out, err = call([*SMALL, f"--workdir={path}", "--config.keep=stages"], environment)
    assert code == 0, err
    return path, out


def test_a_run_leaves_its_files_and_says_where(finished):
    path, out = finished
    for name in ("config.json", "plan.json", "results.parquet", "summary.json", "report.html", "checkpoints"):
        assert (path / name).exists(), name
    assert (path / "figures" / "gap.png").read_bytes().startswith(b"\x89PNG")
    assert str(path / "report.html") in out and "gap" in out
    summary = json.loads((path / "summary.json").read_text())
    assert [arm["warm_start_epochs"] for arm in summary] == [0, 2, 4]
    assert all(arm["trials"] == 3 for arm in summary)
    assert summary[0]["gap"] is None and summary[2]["pairs"] == 3
    table = read(path / "results.parquet")
    keys = ["trial", "stage", "step"]
    assert table[keys].equals(table[keys].sort_values(keys, ignore_index=True))


def test_a_relative_workdir_does_as_well(finished, environment, tmp_path):
    relative = os.path.relpath(tmp_path)
    code, _, err = call([*SMALL, f"--workdir={relative}", "--config.keep=stages"], environment)
    assert code == 0, err
    assert (tmp_path / "results.parquet").read_bytes() == (finished[0] / "results.parquet").read_bytes()

    import plastic_jax

    assert plastic_jax.load(relative).model(0).logits(np.zeros((1, 8, 8, 1), np.uint8)).shape == (1, 10)


def test_summary_is_the_paired_mean_of_the_table(finished):
    """Recomputed from results.parquet by hand."""
    path, _ = finished
    table = pd.read_parquet(path / "results.parquet")
    tuning = table[(table.stage == "tuning") & (table.epoch >= 5)]
    means = tuning.groupby(["warm_start_epochs", "seed"]).test_accuracy.mean().unstack()
    summary = json.loads((path / "summary.json").read_text())
    for arm in summary[1:]:
        assert arm["gap"] == pytest.approx((means.loc[arm["warm_start_epochs"]] - means.loc[0]).mean(), abs=1e-12)


def test_the_same_command_on_a_finished_run_trains_nothing(finished, environment):
    path, _ = finished
    before = (path / "results.parquet").read_bytes()
    stamp = (path / "checkpoints" / "run").stat().st_mtime
    code, out, err = call([*SMALL, f"--workdir={path}", "--config.keep=stages"], environment)
    assert code == 0 and "gap" in out, err
    assert (path / "results.parquet").read_bytes() == before
    assert (path / "checkpoints" / "run").stat().st_mtime == stamp


def test_another_config_on_a_workdir_is_refused_by_field(finished, environment):
    path, _ = finished
    before = (path / "results.parquet").read_bytes()
    refused(
        [*SMALL, f"--workdir={path}", "--config.keep=stages", "--config.learning_rate=0.5"],
        environment, "learning_rate was 0.001, is now 0.5", "--overwrite",
    )  # fmt: skip
    assert (path / "results.parquet").read_bytes() == before


def test_kept_models_are_what_the_table_says(finished):
    import plastic_jax
    from plastic_jax import data

    path, _ = finished
    run = plastic_jax.load(path)
    test = data.load("digits")
    checked = 0
    for (trial, stage), _ in run.kept.items():
        rows = run.table[(run.table.trial == trial) & (run.table.stage == stage)]
        logits = run.model(trial, stage).logits(test.test_images)
        accuracy = (logits.argmax(-1) == test.test_labels).mean()
        assert float(accuracy) == pytest.approx(rows.iloc[-1].test_accuracy, abs=1e-6)
        checked += 1
    assert checked == 3 + 3 * 2 * 2  # fresh: one stage; each warm start: two


def test_run_from_python_does_what_the_entry_point_does(finished, tmp_path):
    """Called in a process of four devices: mapped trials do not depend on their number."""
    import plastic_jax
    from experiments.warm_start import EXPERIMENT, QUICKSTART

    path, _ = finished
    config = dict(
        QUICKSTART, train_examples=60, width=8, depth=1, batch_size=10, warm_start_epochs=(0, 2, 4), tuning_epochs=6,
        metric_epochs=2, seeds=3, keep="stages",
    )  # fmt: skip
    run = plastic_jax.run(config, tmp_path / "run", study=EXPERIMENT, wandb="disabled", say=lambda _: None)
    assert (tmp_path / "run" / "results.parquet").read_bytes() == (path / "results.parquet").read_bytes()
    assert run is not None and run.summary == plastic_jax.load(path).summary


@pytest.mark.parametrize("delay", [0.0, 0.4, 1.0, 1.8])
def test_killed_and_started_again_gives_equal_bytes(finished, environment, tmp_path, delay):
    """kill -9 `delay` seconds after the first checkpoint or table appears, then again in its second life."""
    path, _ = finished
    arguments = [*SMALL, f"--workdir={tmp_path}", "--config.keep=stages", "--config.checkpoint_minutes=0.0001"]
    for _ in range(2):
        process = start(arguments, environment)
        limit = time.monotonic() + 120
        while not (tmp_path / "config.json").exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.02)
        while not list(tmp_path.glob("checkpoints/run/*")) and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.02)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    code, _, err = call(arguments, environment)
    assert code == 0, err
    assert (tmp_path / "results.parquet").read_bytes() == (path / "results.parquet").read_bytes()
    kept = [json.loads(f.read_text()) for f in sorted(tmp_path.glob("checkpoints/kept/*/index.json"))]
    assert kept == [json.loads(f.read_text()) for f in sorted(path.glob("checkpoints/kept/*/index.json"))]


def test_interrupted_it_saves_and_says_so(environment, tmp_path, finished):
    path, _ = finished
    arguments = [*SMALL, f"--workdir={tmp_path}", "--config.keep=stages"]
    process = start(arguments, environment)
    while not (tmp_path / "config.json").exists() and process.poll() is None:
        time.sleep(0.02)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode in (130, 0) or "Interrupted" in err, err
    assert "Traceback" not in err
    code, _, err = call(arguments, environment)
    assert code == 0, err
    assert (tmp_path / "results.parquet").read_bytes() == (path / "results.parquet").read_bytes()


def test_a_damaged_checkpoint_gives_way_to_an_older_one(environment, tmp_path, finished):
    path, _ = finished
    arguments = [*SMALL, f"--workdir={tmp_path}", "--config.keep=stages", "--config.checkpoint_minutes=0.0001"]
    process = start(arguments, environment)
    while len(_whole(tmp_path)) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    _without_a_half_finished_one(tmp_path)
    assert len(_whole(tmp_path)) >= 2
    _damage(_whole(tmp_path)[-1])
    code, out, err = call(arguments, environment)
    assert code == 0, err
    assert "damaged" in out
    assert (tmp_path / "results.parquet").read_bytes() == (path / "results.parquet").read_bytes()


def test_damaged_checkpoints_alone_are_refused_and_nothing_is_touched(environment, tmp_path):
    arguments = [*SMALL, f"--workdir={tmp_path}", "--config.tuning_epochs=5000", "--config.checkpoint_minutes=0.0001"]
    process = start(arguments, environment)
    while not _whole(tmp_path) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    _without_a_half_finished_one(tmp_path)
    for step in _whole(tmp_path):
        _damage(step)
    table = (tmp_path / "results.parquet").read_bytes()
    refused(arguments, environment, "all checkpoints in", "restore one of them, or name another folder")
    assert (tmp_path / "results.parquet").read_bytes() == table


def _whole(path: Path) -> list[Path]:
    """The finished checkpoints, oldest first: those whose checksum is written."""
    try:
        finished = json.loads((path / "checkpoints/run.json").read_text())
    except FileNotFoundError:
        return []
    found = (path / "checkpoints/run" / step for step in finished)
    return sorted((step for step in found if step.exists()), key=lambda p: int(p.name))


def _without_a_half_finished_one(path: Path) -> None:
    """Remove a checkpoint that was killed before its checksum was written; how often that happens is chance."""
    for step in {*(path / "checkpoints/run").glob("[0-9]*")} - {*_whole(path)}:
        shutil.rmtree(step)


def _damage(step: Path) -> None:
    """Flip a byte in each file of the checkpoint's data."""
    for file in (f for f in step.rglob("*") if f.is_file() and f.parent.name == "d"):
        content = bytearray(file.read_bytes())
        if content:
            content[len(content) // 2] ^= 0xFF
            file.write_bytes(content)


def test_a_workdir_in_use_is_refused(environment, tmp_path):
    arguments = [*SMALL, f"--workdir={tmp_path}", "--config.tuning_epochs=5000"]
    process = start(arguments, environment)
    try:
        while not (tmp_path / "config.json").exists() and process.poll() is None:
            time.sleep(0.05)
        refused(arguments, environment, str(tmp_path), "in use by a running process")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.wdth=8"], ["wdth", "did you mean width"]),
        (["--widht=8"], ["widht", "no flag"]),
        (["--preset=huge"], ["huge", "quickstart, paper"]),
        (["--config.width=abc"], ["width", "abc", "a whole number"]),
        (["--config.seeds=0"], ["seeds", "at least 1"]),
        (["--config.dataset=mnits"], ["mnits", "digits"]),
        (["--config.train_examples=20", "--config.batch_size=32"], ["batch_size=32", "20 examples"]),
        (["--wandb=sometimes"], ["sometimes", "offline"]),
        (["--workdir=/proc/nowhere/run"], ["/proc/nowhere/run", "cannot be written"]),
        (["stray"], ["stray"]),
        (["--device_memory_gib=nan", "--dry_run"], ["nan", "above 0"]),
        (["--device_memory_gib=0.0001", "--dry_run"], ["GiB", "smaller"]),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, words, environment, tmp_path):
    folder = [] if any("workdir" in a for a in arguments) else [f"--workdir={tmp_path / 'run'}"]
    refused([*arguments, *folder], environment, *words)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_missing_or_damaged_data_file_is_one_sentence(environment, tmp_path):
    arguments = ["--config.dataset=cifar10", f"--data_dir={tmp_path}", f"--workdir={tmp_path / 'run'}"]
    refused(arguments, environment, "cifar-10-binary", str(tmp_path))
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"no archive")
    refused(arguments, environment, "damaged", "cifar-10-binary.tar.gz")


def test_a_diverging_rate_marks_rows_and_hurts_no_other(environment, tmp_path):
    arguments = [*SMALL, "--config.learning_rate=(0.001, 1e30)", "--config.optimizer=sgd", f"--workdir={tmp_path}"]
    code, _, err = call(arguments, environment)
    assert code == 0, err
    table = read(tmp_path / "results.parquet")
    assert table[table.learning_rate == 1e30].groupby("trial").diverged.any().all()
    assert not table[table.learning_rate == 0.001].diverged.any()
    summary = json.loads((tmp_path / "summary.json").read_text())
    for arm in summary:
        assert arm["diverged"] == (3 if arm["learning_rate"] == 1e30 else 0)
        assert arm["learning_rate"] != 1e30 or arm["verdict"] is None


def test_overrides_win_over_the_preset_in_any_order(environment, tmp_path):
    plans = []
    for k, order in enumerate((["--preset=paper", "--config.seeds=2"], ["--config.seeds=2", "--preset=paper"])):
        folder = tmp_path / str(k)
        code, out, err = call([*order, "--dry_run", "--device_memory_gib=80", f"--workdir={folder}"], environment)
        assert code == 0, err
        assert "11.2 M" in out
        plans.append(json.loads((folder / "plan.json").read_text()))
        assert not (folder / "config.json").exists()
    assert plans[0] == plans[1]
    assert plans[0]["seeds"] == 2 and plans[0]["trials"] == 80 and len(plans[0]["programs"]) == 4


def test_the_last_of_a_repeated_flag_wins(environment, tmp_path):
    arguments = ["--dry_run", "--config.width=8", "--config.width=16", "--config.seeds=2", f"--workdir={tmp_path}"]
    code, out, err = call(arguments, environment)
    assert code == 0, err
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [p["width"] for p in plan["programs"]] == [16] and "8 trials" in out


def test_overwrite_deletes_nothing_before_the_new_run_can_start(finished, environment, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(finished[0], path)
    before = (path / "results.parquet").read_bytes()
    code, _, err = call([*SMALL, f"--workdir={path}", "--overwrite", "--dry_run"], environment)
    assert code == 0, err
    refused(
        [*SMALL, f"--workdir={path}", "--overwrite", "--config.dataset=cifar10", f"--data_dir={tmp_path}"],
        environment, "cifar-10-binary",
    )  # fmt: skip
    assert (path / "results.parquet").read_bytes() == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"mine": 1}')
    refused([*SMALL, f"--workdir={foreign}", "--overwrite"], environment, "no run left there")
    assert (foreign / "config.json").read_text() == '{"mine": 1}'
    code, _, err = call([*SMALL, f"--workdir={path}", "--overwrite", "--config.seeds=2"], environment)
    assert code == 0, err
    assert read(path / "results.parquet").seed.nunique() == 2


def test_a_run_on_data_that_changed_is_refused(finished, environment, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(finished[0], path)
    config = json.loads((path / "config.json").read_text())
    config["datasets"]["digits"]["crc32"] += 1
    (path / "config.json").write_text(json.dumps(config))
    refused([*SMALL, f"--workdir={path}", "--config.keep=stages"], environment, "other data", "digits")


def test_help_names_the_flags(environment):
    code, out, _ = call(["--help"], environment)
    assert code in (0, 1)
    for flag in ("preset", "workdir", "dry_run", "wandb", "overwrite"):
        assert re.search(rf"--(\[no\])?{flag}\b", out), flag

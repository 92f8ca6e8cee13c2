"""Tracking online: W&B holds what the results table holds, and no trouble with it stops training."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from wandb_server import (
    NOBODY,
    Server,
    expected_history,
    make_summary,
    make_table,
    make_trials,
    own_columns,
    read_offline,
)

from plastic_jax import tracking
from plastic_jax.report import wandb_runs
from plastic_jax.report.tracker import Tracker
from plastic_jax.report.wandb_runs import Trial

pytestmark = pytest.mark.usefixtures("without_wandb")


def wait_for(what: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def descendants(pid: int) -> list[int]:
    """The living processes that a process started, and theirs."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "Z":
                parents[int(entry.name)] = int(parent)
    found: list[int] = []
    for child in [child for child, parent in parents.items() if parent == pid]:
        found += [child, *descendants(child)]
    return found


def test_online_runs_hold_the_results_table(tmp_path: Path, server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    trials, said = make_trials(), list[str]()
    table, summary = make_table(trials), make_summary(trials)
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    hooks = sys.exit, sys.excepthook
    tracker = Tracker("auto", tmp_path, "paper", "digits", trials, said.append)
    assert tracker.mode == "online"
    rows = table.sort_values("step", kind="stable").to_dict("records")
    for start in range(0, len(rows) - 3, 7):  # some are left for `finish` to send
        before = time.monotonic()
        tracker.log(rows[start : start + 7])
        assert time.monotonic() - before < 0.05
    wait_for(lambda: len(server.runs) == 4)  # live: long before the end
    assert all(run["exit"] is None for run in server.runs.values())
    tracker.finish(table, summary)
    for trial in trials:
        name = wandb_runs.run_id("digits", trial.config, trial.seed)
        run, history = server.runs[name], expected_history(table, trial.trial)
        assert own_columns(server.history(name)) == history
        assert run["groupName"] == trial.arm and run["exit"] == 0
        assert run["displayName"] == f"{trial.arm}, seed={trial.seed}"
        config = {key: entry["value"] for key, entry in json.loads(run["config"]).items()}
        metrics = {metric["1"]: metric for metric in config.pop("_wandb")["m"] if "1" in metric}
        assert "5" in metrics["test_accuracy"], "plotted against W&B's step, not examples_seen"
        assert config == {**trial.config, "arm": trial.arm, "seed": trial.seed}
        assert run["summary"].get("gap") == (-0.01 if trial.config["fraction"] else None)
        tuned = [row for row in history if row["stage"] == "tuning"][-1]
        assert run["summary"]["test_accuracy"] == tuned["test_accuracy"]
    assert [sentence.split(" at ")[0] for sentence in said] == [
        "W&B: the runs are live",
        "W&B: 4 runs are complete",
    ]
    assert not list(tmp_path.glob("wandb/offline-run-*"))
    # W&B leaves nothing behind: no process, no handler, no banner; and what is up stays up.
    assert not descendants(os.getpid())
    assert handlers == {number: signal.getsignal(number) for number in signal.valid_signals()}
    assert hooks == (sys.exit, sys.excepthook)
    assert capfd.readouterr() == ("", "")
    Tracker("offline", tmp_path, "paper", "digits", trials, said.append).finish(table, summary)
    assert not list(tmp_path.glob("wandb/offline-run-*"))


def train_and_be_killed(tmp_path: Path, trials: list[Trial], rows: pd.DataFrame) -> None:
    """A process that logs some rows online and is killed as soon as they are on their way."""
    script = f"""
        import json, os, pathlib, signal, time
        from plastic_jax.report.tracker import Tracker
        from plastic_jax.report.wandb_runs import Trial
        workdir = pathlib.Path({str(tmp_path)!r})
        trials = [Trial(**trial) for trial in json.load(open(workdir / "trials"))]
        tracker = Tracker("auto", workdir, "p", "digits", trials, print)
        tracker.log(json.load(open(workdir / "rows")))
        while not list(workdir.glob("wandb/run-*")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    (tmp_path / "trials").write_text(json.dumps([vars(trial) for trial in trials]))
    (tmp_path / "rows").write_text(rows.to_json(orient="records", double_precision=15))
    command = [sys.executable, "-c", textwrap.dedent(script)]
    root = Path(tracking.__file__).parents[1]
    done = subprocess.run(command, cwd=root, timeout=60, stdout=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGKILL


def test_a_killed_online_run_keeps_its_rows_and_goes_on(tmp_path: Path, server: Server) -> None:
    """Training ends without `finish`: its rows still arrive; the next process adds the others."""
    trials = make_trials(arms=1)
    table = make_table(trials).round(6)
    train_and_be_killed(tmp_path, trials, table[table["step"] < 30])
    wait_for(lambda: [run["exit"] for run in server.runs.values()] == [1, 1])
    names = [wandb_runs.run_id("digits", trial.config, trial.seed) for trial in trials]
    for name, trial in zip(names, trials, strict=True):
        expected = [row for row in expected_history(table, trial.trial) if row["step"] < 30]
        assert own_columns(server.history(name)) == expected

    tracker = Tracker("auto", tmp_path, "p", "digits", trials, print)
    tracker.log(table[table["step"] >= 20].to_dict("records"))  # from the last checkpoint on
    tracker.finish(table, make_summary(trials))
    for name, trial in zip(names, trials, strict=True):
        assert own_columns(server.history(name)) == expected_history(table, trial.trial)
        assert server.runs[name]["exit"] == 0


def test_an_arm_of_many_seeds_goes_on(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seeds of an arm come one after another, so that the steps of its W&B run start over."""
    monkeypatch.setattr(wandb_runs, "MOST_TRIALS", 1)
    trials = make_trials(arms=1)
    table = make_table(trials).round(6)
    for seed in (0, 1):  # each in a process of its own, as after a resume
        tracker = Tracker("auto", tmp_path, "p", "digits", trials, print)
        tracker.log(table[table["trial"] == seed].to_dict("records"))
        tracker.finish(table[table["trial"] <= seed], make_summary(trials))
    (name,) = server.runs
    history = own_columns(server.history(name))
    for trial in trials:
        column = f"test_accuracy/seed_{trial.seed}"
        held = {row["step"]: row[column] for row in history if column in row}
        own = table[(table["trial"] == trial.trial) & (table["stage"] == "tuning")]
        assert held == dict(zip(own["step"], own["test_accuracy"], strict=True))


@pytest.mark.parametrize("trouble", ["no server", "refused key"])
def test_a_server_that_never_answers_costs_a_sentence(
    trouble: str, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trouble == "no server":
        monkeypatch.setenv("WANDB_BASE_URL", NOBODY)
    server.status = 401
    trials, said = make_trials(), list[str]()
    table = make_table(trials)
    tracker = Tracker("auto", tmp_path, "p", "digits", trials, said.append, init_seconds=1.5)
    assert tracker.mode == "online"
    before = time.monotonic()
    rows = table.to_dict("records")
    for _ in range(1000):
        tracker.log(rows[:4])
    assert time.monotonic() - before < 1
    tracker.finish(table, make_summary(trials))
    assert len(said) == 2 and "training is not affected" in said[0] and "wandb sync" in said[1]
    assert time.monotonic() - before < 20
    assert own_columns(read_offline(tmp_path)["fraction=1, seed=0"]["history"]) == expected_history(table, 2)
    assert not descendants(os.getpid())


@pytest.mark.parametrize("trouble", ["lost network", "revoked key", "killed service"])
def test_trouble_in_the_middle_costs_a_sentence(trouble: str, tmp_path: Path, server: Server) -> None:
    trials, said = make_trials(arms=1), list[str]()
    table = make_table(trials)
    tracker = Tracker("auto", tmp_path, "p", "digits", trials, said.append, finish_seconds=2.5)
    rows = table.sort_values("step", kind="stable").to_dict("records")
    tracker.log(rows[:6])
    wait_for(lambda: len(said) == 1 and len(server.runs) == 2)
    assert "live" in said[0]
    if trouble == "lost network":
        server.stop()
    elif trouble == "revoked key":
        server.status = 401
    else:
        for child in descendants(os.getpid()):
            if "wandb-core" in Path(f"/proc/{child}/cmdline").read_text():
                os.kill(child, signal.SIGKILL)
    tracker.log(rows[6:])
    before = time.monotonic()
    tracker.finish(table, make_summary(trials))
    assert time.monotonic() - before < 2.5 + 6
    assert len(said) == 3 and "training is not affected" in said[1]
    assert "2 runs are in" in said[2] and "wandb sync" in said[2]
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 2
    assert not descendants(os.getpid())


def test_a_folder_that_cannot_be_written_costs_a_sentence(tmp_path: Path) -> None:
    trials, said = make_trials(), list[str]()
    (tmp_path / "wandb").write_text("a file where the folder should be")
    tracker = Tracker("offline", tmp_path, "p", "digits", trials, said.append)
    tracker.log([])
    tracker.finish(make_table(trials), [])
    assert len(said) == 1 and "cannot be written" in said[0] and tracker.mode == "disabled"


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_full_disk_costs_sentences(mode: str, tmp_path: Path, server: Server) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system to fill")
    try:
        trials, said = make_trials(), list[str]()
        table = make_table(trials)
        tracker = Tracker(mode, disk, "p", "digits", trials, said.append)
        with pytest.raises(OSError, match="No space"):
            (disk / "filler").write_bytes(bytes(200_000))
        tracker.log(table.to_dict("records"))
        tracker.finish(table, make_summary(trials))
        assert "No space left on device" in said[-1] and "holds everything" in said[-1]
        assert not list(disk.glob("wandb/offline-run-*/*.wandb")), "half a run is worse than none"
        (disk / "filler").unlink()
        Tracker("offline", disk, "p", "digits", trials, said.append).finish(table, [])
        assert "4 runs are in" in said[-1]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)

"""Tracking: W&B holds what the results table holds, and nothing that W&B does stops training.

The real wandb runs here: its reader (`wandb leet inspect`), its `wandb sync` and its service
process, against a server on 127.0.0.1 that answers as far as they ask.
"""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wandb_server import (
    KEY,
    METRICS,
    Server,
    expected_history,
    make_summary,
    make_table,
    make_trials,
    output,
    own_columns,
    read_log,
    read_offline,
)

from plastic_jax import tracking
from plastic_jax.errors import InputError
from plastic_jax.report import tracker as tracker_module
from plastic_jax.report import wandb_log, wandb_runs
from plastic_jax.report.tracker import Tracker
from plastic_jax.report.wandb_runs import Trial
from plastic_jax.results import tables

pytestmark = pytest.mark.usefixtures("without_wandb")


def test_run_ids_name_the_experiment_the_config_and_the_seed() -> None:
    first = wandb_runs.run_id("digits", {"a": 1, "b": 2.5}, 3)
    assert first == wandb_runs.run_id("digits", {"b": 2.5, "a": 1}, 3)
    assert first == "2a0fdaa7dce0ef3d", "ids changed: runs of earlier versions are no longer found"
    others = {
        wandb_runs.run_id("other", {"a": 1, "b": 2.5}, 3),
        wandb_runs.run_id("digits", {"a": 1, "b": 2}, 3),
        wandb_runs.run_id("digits", {"a": 1, "b": 2.5}, 4),
    }
    assert len(others | {first}) == 4
    equal = [Trial(0, "one", 0, {"a": 1}), Trial(1, "two", 0, {"a": 1})]
    assert len({run.id for run in wandb_runs.plan_runs("digits", equal)}) == 2
    long = wandb_runs.plan_runs("digits", [Trial(0, "x" * 300, 12, {}), Trial(1, "x" * 301, 12, {})])
    assert all(max(len(run.name), len(run.group)) <= 128 for run in long)
    assert long[0].name.endswith(", seed=12") and long[0].group != long[1].group


def test_offline_runs_hold_the_results_table(tmp_path: Path) -> None:
    trials, said = make_trials(), list[str]()
    table, summary = make_table(trials), make_summary(trials)
    tracker = Tracker("auto", tmp_path, "paper", "digits", trials, said.append)
    assert tracker.mode == "offline" and "no API key" in said[0]
    assert f"wandb sync {tmp_path}/wandb" in said[0]
    tracker.log(table.to_dict("records"))
    assert not list(tmp_path.glob("wandb/offline-run-*"))
    tracker.finish(table, summary)
    assert f"wandb sync {tmp_path}/wandb" in said[1] and len(said) == 2

    runs = read_offline(tmp_path)
    assert sorted(runs) == sorted(f"{trial.arm}, seed={trial.seed}" for trial in trials)
    for trial in trials:
        run = runs[f"{trial.arm}, seed={trial.seed}"]
        history = expected_history(table, trial.trial)
        assert own_columns(run["history"]) == history
        assert run["run_group"] == trial.arm and run["project"] == "paper"
        assert run["job_type"] == "digits" and run["exit"] == 0
        assert run["config"] == {**trial.config, "arm": trial.arm, "seed": trial.seed}
        assert run["metric"]["test_accuracy"]["step_metric"] == "examples_seen"
        last: dict[str, Any] = {}
        for row in history:
            last |= row
        gap = {"gap": -0.01, "gap_ci95_low": -0.02, "gap_ci95_high": 0.005}
        arm = {"pairs": 2 * trial.config["fraction"], "arm/trials": 2, "arm/test_accuracy": 0.5}
        expected = last | arm | (gap if trial.config["fraction"] else {})
        assert {k: v for k, v in run["summary"].items() if not k.startswith("_")} == expected


def test_offline_runs_are_written_once_per_id_and_again_where_the_table_changed(
    tmp_path: Path,
) -> None:
    def folders() -> dict[str, str]:
        return {p.name.split("-")[3]: p.name for p in tmp_path.glob("wandb/offline-run-*")}

    trials, said = make_trials(), list[str]()
    table, summary = make_table(trials), make_summary(trials)
    Tracker("offline", tmp_path, "p", "digits", trials, said.append).finish(table, summary)
    first = folders()
    Tracker("offline", tmp_path, "p", "digits", trials, said.append).finish(table, summary)
    assert folders() == first and "4 of them from before" in said[-1]
    changed = table.copy()
    changed.loc[changed["trial"] == 2, "test_accuracy"] += 0.125
    Tracker("offline", tmp_path, "p", "digits", trials, said.append).finish(changed, summary)
    second = folders()
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 4, "the older run is still there"
    assert {name for name in first if first[name] != second[name]} == {
        wandb_runs.run_id("digits", trials[2].config, trials[2].seed)
    }
    rows = own_columns(read_offline(tmp_path)["fraction=1, seed=0"]["history"])
    assert rows == expected_history(changed, 2)


def test_a_written_log_is_what_wandb_itself_writes(tmp_path: Path) -> None:
    """If this fails after an upgrade of wandb, wandb_log has to follow its format."""
    script = """
        import json, sys, wandb
        run, rows, summary = json.load(sys.stdin)
        settings = wandb.Settings(console="off", silent=True, x_disable_stats=True, host="")
        made = wandb.init(mode="offline", id=run["id"], project=run["project"], name=run["name"],
            group=run["group"], job_type=run["job_type"], config=run["config"], dir=sys.argv[1],
            settings=settings)
        made.define_metric("examples_seen", hidden=True)
        made.define_metric("step", hidden=True)
        for name in rows[0][1]:
            if name not in ("examples_seen", "step"):
                made.define_metric(name, step_metric="examples_seen")
        for step, values in rows:
            made.log(values, step=step)
        made.summary.update(summary)
        made.finish()
    """
    run: dict[str, Any] = {"id": "abc", "project": "p", "name": "a, seed=0", "group": "a"}
    run["job_type"] = "digits"
    run["config"] = {"fraction": 0.5, "name": "ä", "sizes": [1, 2], "none": None}
    text = "long " * 20_000  # longer than a block of the log
    rows = [
        (step, {"stage": text if step == 7 else "tuning", "step": step}
         | {"examples_seen": 32 * step, "test_accuracy": 1 / (step + 3), "test_loss": 1e-12 * step})
        for step in range(0, 2000, 7)
    ]  # fmt: skip
    summary = {"gap": -0.25, "verdict": "worse"}
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        input=json.dumps([run, rows, summary]),
        text=True,
        check=True,
        timeout=60,
    )
    (theirs_folder,) = tmp_path.glob("wandb/offline-run-*")
    (tmp_path / "ours").mkdir()
    wandb_log.write(tmp_path / "ours" / "run-abc.wandb", run, rows, summary)
    ours, theirs = read_log(tmp_path / "ours"), read_log(theirs_folder)
    assert own_columns(ours["history"]) == own_columns(theirs["history"])
    assert [row["_step"] for row in ours["history"]] == [row["_step"] for row in theirs["history"]]
    assert ours["config"] == {k: v for k, v in theirs["config"].items() if k != "_wandb"}
    for key in ("run_id", "project", "display_name", "run_group", "job_type", "metric", "exit"):
        assert ours[key] == theirs[key]
    ours["summary"].pop("_timestamp")
    times = ("_timestamp", "_runtime", "_wandb.runtime")
    assert ours["summary"] == {k: v for k, v in theirs["summary"].items() if k not in times}


def test_the_command_writes_a_killed_run_and_wandb_sync_uploads_it(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = make_trials()
    table = make_table(trials)[lambda frame: frame["trial"] < 3]
    config = {"experiment": "digits", "trials": [vars(trial) for trial in trials]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tables.write(table, tmp_path / "results.parquet", ["fraction"])
    assert tracking.main([str(tmp_path), "--project=paper"]) == 0
    assert "3 runs are in" in capsys.readouterr().out and not server.runs
    output(sys.executable, "-m", "wandb", "sync", str(tmp_path / "wandb"), cwd=tmp_path)
    assert len(server.runs) == 3
    for trial in trials[:3]:
        name = wandb_runs.run_id("digits", trial.config, trial.seed)
        assert own_columns(server.history(name)) == expected_history(table, trial.trial)
        assert server.runs[name]["groupName"] == trial.arm
        assert server.runs[name]["project"] == "paper" and server.runs[name]["exit"] == 0


def test_the_command_refuses_what_is_no_workdir(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tracking.main([str(tmp_path)]) == 2
    assert "is no workdir: no config.json in it" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"experiment": "digits"}')
    assert tracking.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "config.json").write_text('{"experiment": "digits", "trials": []}')
    assert tracking.main([str(tmp_path)]) == 2
    assert "there is no results table" in capsys.readouterr().err


def test_many_trials_are_one_run_per_arm_with_a_column_per_seed(tmp_path: Path) -> None:
    trials = make_trials(arms=2, seeds=129)
    table = make_table(trials, epochs=2)
    tracker = Tracker("offline", tmp_path, "p", "digits", trials, print)
    tracker.finish(table, make_summary(trials))
    runs = read_offline(tmp_path)
    assert sorted(runs) == ["fraction=0", "fraction=1"]
    run = runs["fraction=1"]
    own = table[table["arm"] == "fraction=1"]
    assert run["config"]["seed"] == list(range(129)) and run["summary"]["gap"] == -0.01
    rows = own_columns(run["history"])
    assert len(rows) == own[["stage", "step"]].drop_duplicates().shape[0]
    for row in rows:
        at = own[(own["stage"] == row["stage"]) & (own["step"] == row["step"])]
        prefix = "tuning_continued/" if row["stage"] == "tuning_continued" else ""
        for metric in METRICS:
            seen = {
                int(name.rpartition("_")[2]): value
                for name, value in row.items()
                if name.startswith(f"{prefix}{metric}/seed_")
            }
            assert seen == dict(at.set_index("seed")[metric].dropna())
            if seen:
                assert row[f"{prefix}{metric}/mean"] == pytest.approx(np.mean([*seen.values()]))


def test_without_wandb_a_sentence_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # Python's word for: cannot be imported
    trials, said = make_trials(), list[str]()
    tracker = Tracker("auto", tmp_path, "p", "digits", trials, said.append)
    tracker.log([{"trial": 0}])
    tracker.finish(make_table(trials), [])
    assert len(said) == 1 and "not installed" in said[0] and not (tmp_path / "wandb").exists()


def test_disabled_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    trials, said = make_trials(), list[str]()
    tracker = Tracker("disabled", tmp_path, "p", "digits", trials, said.append)
    tracker.log([{"trial": 0}])
    tracker.finish(make_table(trials), [])
    assert not said and not (tmp_path / "wandb").exists()


def test_the_mode_is_found_without_importing_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mode(flag: str = "auto") -> str:
        return tracker_module._choose_mode(flag, tmp_path)[0]

    assert mode() == mode("online") == "offline"
    (tmp_path / "home" / "netrc").write_text(f"machine 127.0.0.1:9 login user password {KEY}\n")
    assert mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://api.wandb.ai")
    assert mode() == "offline", "the key is for another server"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert (mode(), mode("offline"), mode("disabled")) == ("online", "offline", "disabled")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert (mode(), mode("online")) == ("offline", "online")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mode() == "disabled"
    with pytest.raises(InputError, match="--wandb=on is not known; allowed are auto, online"):
        mode("on")

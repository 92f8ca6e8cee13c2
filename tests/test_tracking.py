"""Tracking: W&B holds what the results table holds, and nothing that W&B does stops training.

The real wandb runs here: its reader (`wandb leet inspect`), its `wandb sync` and its service
process, against a server on 127.0.0.1 that answers as far as they ask.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from plastic_jax import tracking
from plastic_jax.errors import InputError
from plastic_jax.report import tracker as tracker_module
from plastic_jax.report import wandb_log, wandb_runs
from plastic_jax.report.tracker import Tracker
from plastic_jax.report.wandb_runs import Trial
from plastic_jax.results import tables

KEY = "0123456789" * 4
NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens
METRICS = ("train_accuracy", "train_loss", "test_accuracy", "test_loss", "fit_accuracy")
AXES = ("stage", "epoch", "step", "examples_seen")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, no settings and no server but those that a test names."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", NOBODY)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def make_trials(arms: int = 2, seeds: int = 2) -> list[Trial]:
    return [
        Trial(arm * seeds + seed, f"fraction={arm}", seed, {"fraction": arm, "model": "mlp"})
        for arm in range(arms)
        for seed in range(seeds)
    ]


def make_table(trials: list[Trial], epochs: int = 4) -> pd.DataFrame:
    """Two stages that meet at one step, and the control; one trial diverges at its end."""
    random = np.random.default_rng(0)
    rows = []
    for trial in trials:
        step = 0
        for stage in ("pretraining", "tuning", "tuning_continued")[1 - trial.config["fraction"] :]:
            for epoch in range(epochs):
                step += 10 * (epoch > 0)
                metrics: dict[str, Any] = {name: random.random() for name in METRICS}
                if epoch < epochs - 1:
                    metrics["fit_accuracy"] = None
                dead = trial is trials[-1] and stage == "tuning_continued" and epoch == epochs - 1
                if dead:
                    metrics = dict.fromkeys(METRICS)
                rows.append(
                    {"trial": trial.trial, "arm": trial.arm, "seed": trial.seed}
                    | {"fraction": trial.config["fraction"], "stage": stage, "epoch": epoch / 1.0}
                    | {"step": step, "examples_seen": step * 32}
                    | metrics
                    | {"diverged": dead}
                )
    return pd.DataFrame(rows).astype(dict.fromkeys(METRICS, float))


def make_summary(trials: list[Trial]) -> list[dict[str, Any]]:
    return [
        {"arm": arm, "fraction": index, "trials": 2, "pairs": 2 * index, "test_accuracy": 0.5}
        | {"gap": -0.01 if index else None, "gap_ci95": [-0.02, 0.005] if index else None}
        for index, arm in enumerate(dict.fromkeys(trial.arm for trial in trials))
    ]


def expected_history(table: pd.DataFrame, trial: int) -> list[dict[str, Any]]:
    """A trial's rows of the table, as W&B is to hold them."""
    rows = []
    for row in table[table["trial"] == trial].to_dict("records"):
        prefix = "tuning_continued/" if row["stage"] == "tuning_continued" else ""
        values = {f"{prefix}{name}": row[name] for name in METRICS if pd.notna(row[name])}
        diverged = {f"{prefix}diverged": 1} if row["diverged"] else {}
        rows.append({name: row[name] for name in AXES} | values | diverged)
    return rows


def own_columns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A W&B history without W&B's own columns, after a look at the steps."""
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps)), "W&B drops rows whose steps do not increase"
    return [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]


def output(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_offline(workdir: Path) -> dict[str, dict[str, Any]]:
    """Every offline run by name, through W&B's own reader; fails if an id is there twice."""
    runs: dict[str, dict[str, Any]] = {}
    for folder in sorted(workdir.glob("wandb/offline-run-*")):
        run = read_log(folder)
        assert run["display_name"] not in runs
        runs[run["display_name"]] = run
    return runs


def read_log(folder: Path) -> dict[str, Any]:
    """What `wandb leet inspect --json FOLDER` reads, without the second that Python takes."""
    spec = importlib.util.find_spec("wandb")
    assert spec is not None and spec.origin is not None
    core = str(Path(spec.origin).with_name("bin") / "wandb-core")
    (path,) = folder.glob("*.wandb")
    inspect = (core, "leet", "inspect", "--no-observability", "--json", "--run-file", str(path))
    records = [json.loads(line) for line in output(*inspect).splitlines()]
    run: dict[str, Any] = {"history": [], "summary": {}, "metric": {}, "exit": None}
    for record in records:
        kind = record["type"]
        if kind == "run":
            run |= record["run"] | {"config": record["run"]["config"]["update"]}
        elif kind == "history":
            run["history"].append(record["history"]["item"])
        elif kind == "summary":
            run["summary"] |= record["summary"]["update"]
        elif kind == "metric" and "name" in record["metric"]:
            run["metric"][record["metric"]["name"]] = record["metric"]
        elif kind == "exit":
            run["exit"] = record["exit"]["exit_code"]
    return run


class Server(ThreadingHTTPServer):
    """Answers what wandb asks of api.wandb.ai, and keeps what it uploads, by run id."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs: dict[str, dict[str, Any]] = {}
        self.status = 200
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """wandb closes its connections as it likes."""

    def history(self, name: str) -> list[dict[str, Any]]:
        with self.lock:
            lines = self.runs[name]["history"]
            return [json.loads(lines[line]) for line in sorted(lines)]

    def answer(self, query: dict[str, Any]) -> dict[str, Any]:
        asked, given = query.get("operationName"), query.get("variables") or {}
        if asked == "UpsertBucket":
            run = self.runs.setdefault(given["name"], {"history": {}, "summary": {}, "exit": None})
            for key in ("groupName", "displayName", "jobType", "config", "project"):
                if given.get(key):
                    run[key] = given[key]
            project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "me"}}
            bucket = {"id": given["name"], "name": given["name"], "displayName": "", "config": "{}"}
            bucket |= {"historyLineCount": 0, "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if asked == "RunResumeStatus":
            return {"model": {"bucket": self.resume_status(given["name"])}}
        if asked == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/file"} for name in given["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {}

    def resume_status(self, name: str) -> dict[str, Any] | None:
        if name not in self.runs:
            return None
        run = self.runs[name]
        lines = run["history"]
        last = json.loads(lines[max(lines)]) if lines else {}
        return {
            "id": name,
            "name": name,
            "summaryMetrics": json.dumps(last),
            "config": run["config"],
            "displayName": run["displayName"],
            "historyLineCount": len(lines),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([lines[max(lines)]] if lines else []),
            "eventsTail": "[]",
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),
        }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        answer: dict[str, Any] = {}
        with self.server.lock:
            if self.server.status != 200:
                answer = {"errors": [{"message": "refused"}]}
            elif self.path == "/graphql":
                answer = {"data": self.server.answer(body)}
            elif self.path.endswith("/file_stream"):
                run = self.server.runs[self.path.split("/")[-2]]
                files = body.get("files", {})
                lines = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
                for number, line in enumerate(lines["content"], start=lines["offset"]):
                    run["history"][number] = line
                for line in files.get("wandb-summary.json", {"content": []})["content"]:
                    run["summary"] = json.loads(line)
                if body.get("complete"):
                    run["exit"] = body["exitcode"]
        self.reply(answer)

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply({})

    def reply(self, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    yield server
    server.stop()


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

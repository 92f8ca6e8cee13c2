"""A server that answers what wandb asks, a study to log, and readers of what wandb wrote."""

import importlib.util
import json
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from plastic_jax.report.wandb_runs import Trial

KEY = "0123456789" * 4

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens
METRICS = ("train_accuracy", "train_loss", "test_accuracy", "test_loss", "fit_accuracy")

AXES = ("stage", "epoch", "step", "examples_seen")


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

"""PyTorch's ways of training the same trials, each in processes of its own (`torch_worker.py`)."""

import dataclasses
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from plastic_jax.torch_worker import Work

_WORKER = Path(__file__).with_name("torch_worker.py")


def version(python: str) -> str | None:
    """PyTorch's version in that interpreter's environment, None where there is none."""
    command = [python, "-c", "import torch; print(torch.__version__)"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def ways(work: Work, cores: int) -> dict[str, tuple[Work, int]]:
    """Each way's name, work and number of processes: eager and compiled; on a CPU also one thread a core."""
    found = {}
    for compiled in (False, True):
        label = "compiled" if compiled else "eager"
        made = dataclasses.replace(work, compiled=compiled)
        if work.device == "cuda":
            for dtype in ("float32", "bfloat16"):
                found[f"pytorch {label} {dtype}"] = dataclasses.replace(made, dtype=dtype), 1
        else:
            found[f"pytorch {label}, all cores"] = dataclasses.replace(made, threads=cores), 1
            found[f"pytorch {label}, a process a core"] = made, cores
    return found


class Way:
    """Running workers; each trains one trial at a time."""

    def __init__(self, python: str, work: Work, processes: int):
        """Starts the workers and waits until they have compiled and taken their first steps."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(work.threads), "PYTHONWARNINGS": "ignore"}
        command = [python, str(_WORKER), json.dumps(dataclasses.asdict(work))]
        # A pipe that nobody reads would fill and block them.
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        pipes: Any = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True)
        self._workers = [subprocess.Popen(command, env=environment, **pipes) for _ in range(processes)]
        try:
            self.ready = max(self._answer(worker)["ready"] for worker in self._workers)
        except RuntimeError:
            self.close()
            raise

    def _answer(self, worker: Any) -> dict[str, Any]:
        line = worker.stdout.readline()
        if not line:
            self._said.seek(0)
            said = self._said.read().strip().splitlines()
            raise RuntimeError(said[-1] if said else "the worker ended without a word")
        return json.loads(line)

    def train(self, steps: int) -> tuple[float, int]:
        """Seconds, and trial-steps: every process takes so many."""
        begin = time.perf_counter()
        for worker in self._workers:
            assert worker.stdin
            worker.stdin.write(json.dumps({"steps": steps}) + "\n")
            worker.stdin.flush()
        self.last = [self._answer(worker) for worker in self._workers]
        return time.perf_counter() - begin, steps * len(self._workers)

    def peak_bytes(self) -> int:
        """Most memory that the workers have held together."""
        return sum(answer["peak_bytes"] for answer in self.last)

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.kill()
            worker.communicate()
        self._said.close()

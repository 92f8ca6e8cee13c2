"""PyTorch's ways of training the same trials, each in processes of its own (`torch_worker.py`)."""

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from plastic_jax.benchmarks.torch_worker import Work

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
    if work.device == "cuda":
        modes = ("reduce-overhead", "max-autotune")
        compiled = {f"pytorch compiled, {m}": (dataclasses.replace(work, compiled=True, mode=m), 1) for m in modes}
        return {"pytorch eager": (work, 1), **compiled}
    found = {}
    for label, made in (("eager", work), ("compiled", dataclasses.replace(work, compiled=True))):
        found[f"pytorch {label}, a process a core"] = made, cores
        found[f"pytorch {label}, all cores"] = dataclasses.replace(made, threads=cores), 1
    return found


def settings(work: Work) -> str:
    """What all of PyTorch's rows have in common, in words."""
    kind = "foreach" if work.optimizer == "rmsprop" else "fused"
    cast = ", bfloat16 by autocast" if work.dtype == "bfloat16" else ""
    tuned = ", cudnn.benchmark" if work.device == "cuda" else ""
    return f"channels_last, {kind} {work.optimizer}{cast}{tuned}"


class Way:
    """Running workers; each trains one trial at a time."""

    def __init__(self, python: str, work: Work, processes: int, seconds: float):
        """Starts the workers and waits until they have compiled and taken their first steps.

        Args:
          python: the interpreter of an environment with PyTorch.
          work: what each process trains.
          processes: how many.
          seconds: how long an answer may take: a compilation that hangs ends the way, not the benchmark.

        Raises:
          RuntimeError: a worker ended or did not answer in time.
        """
        self._seconds = seconds
        # Kernels that an earlier run compiled would make the time to compile a small one.
        self._kernels = tempfile.TemporaryDirectory(prefix="plastic_jax-torch-", ignore_cleanup_errors=True)
        folders = {f"{name}_CACHE_DIR": f"{self._kernels.name}/{name}" for name in ("TORCHINDUCTOR", "TRITON")}
        environment = {**os.environ, **folders, "OMP_NUM_THREADS": str(work.threads), "PYTHONWARNINGS": "ignore"}
        command = [python, str(_WORKER), json.dumps(dataclasses.asdict(work))]
        # A pipe that nobody reads would fill and block them.
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        pipes: Any = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True)
        # Sessions of their own: a compiler's helpers end with the worker.
        pipes |= dict(env=environment, start_new_session=True)
        self._workers = [subprocess.Popen(command, **pipes) for _ in range(processes)]
        try:
            self.ready = max(answer["ready"] for answer in self._answers())
        except BaseException:
            self.close()
            raise

    def _answers(self) -> list[dict[str, Any]]:
        end = time.monotonic() + self._seconds
        return [self._answer(worker, end) for worker in self._workers]

    def _answer(self, worker: Any, end: float) -> dict[str, Any]:
        if not select.select([worker.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
            raise RuntimeError(f"no answer within {self._seconds:.0f} s")
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
        self.last = self._answers()
        return time.perf_counter() - begin, steps * len(self._workers)

    def peak_bytes(self) -> int:
        """Most memory that the workers have held together."""
        return sum(answer["peak_bytes"] for answer in self.last)

    def close(self) -> None:
        """End the workers."""
        workers, self._workers = self._workers, []
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.communicate()
        self._said.close()
        self._kernels.cleanup()

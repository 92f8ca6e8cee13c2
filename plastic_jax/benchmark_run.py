"""A whole run of the throughput benchmark: each network's table, growth, and the files that they are written to."""

import datetime
import math
import time
from pathlib import Path
from typing import Any

import jax

from plastic_jax import benchmark, benchmark_report, compile_for, torch_ways, workdir
from plastic_jax.config import Sweep
from plastic_jax.errors import InputError
from plastic_jax.growth import growth
from plastic_jax.kernels import Form
from plastic_jax.train.choice import candidates


def absent(config: dict[str, Any], platform: str) -> None:
    """Print what a step of each network's forms takes on a device that is not there (`compile_for.py`).

    Raises:
      InputError: for a field's value that is not allowed, or a platform that cannot be compiled for.
    """
    most = max(config.pop("trials") or (1,))
    config.pop("minutes")
    compile_for.absent(platform)
    if not config["compute_dtype"]:
        config["compute_dtype"] = "bfloat16"
    for point in benchmark.networks(config, gpu=True):
        sweep = Sweep.of({"model": point.model, "kernels": "packed"})
        forms = dict.fromkeys([*candidates(sweep, point, platform, most), Form("mapped")])
        print(f"\n{benchmark.title(point)}, compiled for {platform}:\n")
        spec = benchmark.SPECS[point.model]
        print(compile_for.table([compile_for.figures(point, spec, form, platform) for form in forms]), flush=True)


def run(config: dict[str, Any], path: str, python: str, flops: float) -> None:
    """Measure and write throughput.json, .md and .png into the folder `path`.

    Args:
      config: the command's fields; an empty tuple means the benchmark's own networks.
      path: the folder, made where it is missing.
      python: the interpreter of an environment with PyTorch; without it, its rows are left out.
      flops: those of the paper's figure 2, for the hours that it would take at the rates found.

    Raises:
      InputError: for a field's value that is not allowed, trials that do not fit, or a folder that cannot be made.
    """
    trials, minutes = config.pop("trials"), config.pop("minutes")
    if not trials or any(isinstance(t, bool) or not isinstance(t, int) or not 1 <= t <= 4096 for t in trials):
        raise InputError(f"--config.trials={trials} is not allowed: whole numbers from 1 to 4096.")
    if not math.isfinite(minutes) or minutes <= 0:
        raise InputError(f"--config.minutes={minutes} is not allowed: a number above 0.")
    end = time.monotonic() + 60 * minutes
    jax.config.update("jax_enable_compilation_cache", False)  # or times to compile would be those of an earlier run
    points = benchmark.networks(config, jax.default_backend() == "gpu")
    for point in points:
        benchmark.check(point, trials)
    version = torch_ways.version(python)
    print(f"PyTorch {version}." if version else "No PyTorch: its rows are left out (pip install -e '.[torch]').")
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--workdir={path} cannot be made ({error.strerror}): name another folder.") from None
    found: dict[str, Any] = {"results": [], "growth": None, "left_out": [], "figure_2_flops": flops}
    found["date"] = datetime.date.today().isoformat()

    def save() -> None:
        workdir.write_json(folder / "throughput.json", found)
        benchmark_report.write(found, folder)

    for k, point in enumerate(points):
        left = end - time.monotonic()
        if k and left <= 0:
            found["left_out"].append(benchmark.title(point))
            continue
        share = left / 60 / (len(points) - k + 0.5)  # the last half share is for growth
        result = benchmark.compare(point, tuple(trials), python if version else None, share, print)
        found["results"].append(
            {**result, "pytorch": version, "figure_2": benchmark_report.device_hours(result, flops)}
        )
        print(benchmark_report.markdown(found["results"][-1]), flush=True)
        save()
    chosen = Form(**found["results"][0]["chosen"])
    found["growth"] = growth(points[0], chosen, jax.local_devices(), end - time.monotonic())
    save()
    print("Written: " + ", ".join(str(folder / f"throughput.{kind}") for kind in ("json", "md", "png")))

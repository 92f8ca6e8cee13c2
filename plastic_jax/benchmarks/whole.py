"""A whole run of the throughput benchmark: each network's table, growth, and the files that they are written to."""

import dataclasses
import datetime
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from plastic_jax import data
from plastic_jax.benchmarks import comparison, compile_for, report, torch_ways, ways
from plastic_jax.benchmarks.growth import growth
from plastic_jax.errors import InputError
from plastic_jax.kernels import Form
from plastic_jax.running import dry_run, workdir
from plastic_jax.study import plan, trial
from plastic_jax.study.config import Sweep
from plastic_jax.train.choice import candidates

GIB = 80.0  # of a device, for the plan of the paper's figure 2


def absent(config: dict[str, Any], platform: str) -> None:
    """Print what a step of each network's forms takes on a device that is not there (`compile_for.py`).

    Raises:
      InputError: for a field's value that is not allowed, or a platform that cannot be compiled for.
    """
    most = max(_trials(config.pop("trials")))
    config.pop("minutes")
    compile_for.absent(platform)
    jax.config.update("jax_enable_compilation_cache", False)  # what it holds, no absent device can load
    if not config["compute_dtype"]:
        config["compute_dtype"] = "bfloat16"
    for point in comparison.networks(config, gpu=True):
        sweep = Sweep.of({"model": point.model, "kernels": "packed"})
        forms = dict.fromkeys([*candidates(sweep, point, platform, most), Form("mapped")])
        print(f"\n{ways.title(point)}, compiled for {platform}:\n")
        spec = ways.SPECS[point.model]
        print(compile_for.table([compile_for.figures(point, spec, form, platform) for form in forms]), flush=True)


def _trials(given: Any) -> tuple[int, ...]:
    if not given or any(isinstance(t, bool) or not isinstance(t, int) or not 1 <= t <= 4096 for t in given):
        raise InputError(f"--config.trials={given} is not allowed: whole numbers from 1 to 4096.")
    return tuple(given)


def idle_share(paper: Mapping[str, Any], fresh: Mapping[str, Any], chosen: Form) -> float | None:
    """Share of slots without work in that study, were it run on these devices in that form; None where no plan says."""
    sweep = Sweep.of({**paper, **dataclasses.asdict(chosen)})
    specs = {name: data.spec(name, None) for name in sweep.values["dataset"]}
    study = trial.study(sweep, specs, fresh)
    programs = dry_run.describe(study, plan.programs(study), specs, GIB)["programs"]
    shares = [program.get("idle_share") for program in programs]
    if None in shares:
        return None
    return float(np.average(shares, weights=[program["steps"] for program in programs]))


def run(config: dict[str, Any], path: str, python: str, paper: Mapping[str, Any], fresh: Mapping[str, Any]) -> None:
    """Measure and write throughput.json, .md and .png into the folder `path`.

    Args:
      config: the command's fields; an empty tuple means the benchmark's own networks.
      path: the folder, made where it is missing.
      python: the interpreter of an environment with PyTorch; without it, its rows are left out.
      paper: the config of the paper's figure 2, for the hours that it would take at the rates found.
      fresh: what makes its fresh arm.

    Raises:
      InputError: for a field's value that is not allowed, trials that do not fit, or a folder that cannot be made.
    """
    trials, minutes = _trials(config.pop("trials")), config.pop("minutes")
    if not math.isfinite(minutes) or minutes <= 0:
        raise InputError(f"--config.minutes={minutes} is not allowed: a number above 0.")
    end = time.monotonic() + 60 * minutes
    jax.config.update("jax_enable_compilation_cache", False)  # or times to compile would be those of an earlier run
    points = comparison.networks(config, jax.default_backend() == "gpu")
    for point in points:
        comparison.check(point, trials)
    version = torch_ways.version(python)
    print(f"PyTorch {version}." if version else "No PyTorch: its rows are left out (pip install -e '.[torch]').")
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--workdir={path} cannot be made ({error.strerror}): name another folder.") from None
    found: dict[str, Any] = {"results": [], "growth": None, "left_out": []}
    found["figure_2_flops"] = flops = dry_run.flops(paper, fresh)
    found["date"] = datetime.date.today().isoformat()

    def save() -> None:
        workdir.write_json(folder / "throughput.json", found)
        report.write(found, folder)

    for k, point in enumerate(points):
        left = end - time.monotonic()
        if k and left <= 0:
            found["left_out"].append(ways.title(point))
            continue
        share = left / 60 / (len(points) - k + 0.5)  # the last half share is for growth
        result = comparison.compare(point, trials, python if version else None, share, print)
        result |= {"pytorch": version, "figure_2": report.device_hours(result, flops)}
        idle = idle_share(paper, fresh, Form(**result["chosen"])) if point.model == "resnet" else None
        found["results"].append({**result, "figure_2_idle_share": idle})
        print(report.markdown(found["results"][-1]), flush=True)
        save()
    chosen = Form(**found["results"][0]["chosen"])
    found["growth"] = growth(points[0], chosen, jax.local_devices(), end - time.monotonic())
    save()
    print("Written: " + ", ".join(str(folder / f"throughput.{kind}") for kind in ("json", "md", "png")))

"""Throughput: our core against what a user would run instead; no figure of the paper's.

    python -m experiments.throughput                                                # all networks, about half an hour
    python -m experiments.throughput --config.model=resnet --config.width=8 --config.trials='(1, 4, 16)'
    python -m experiments.throughput --torch_python=OTHER_ENVIRONMENT/bin/python    # PyTorch from elsewhere

Images a second over all trials, for our core in each formulation, for the obvious JAX program, for one trial at a time
in JAX, and for PyTorch's ways (extra `torch`; its rows are left out where it is missing), all of a table's rows in one
dtype; on a GPU there is a table for float32 and one for bfloat16. --config.minutes bounds the whole, but for a program
that is being compiled. Written to --workdir (default runs/throughput): throughput.json, throughput.md, throughput.png.
Expected: on a CPU the obvious program is far behind.
"""

import datetime
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from plastic_jax.entry import last_wins, parse, refuse
from plastic_jax.errors import InputError

FIELDS: dict[str, Any] = {
    **dict.fromkeys(("model", "width", "depth", "batch_size", "optimizer", "compute_dtype"), ()),
    **{"trials": (1, 4, 16, 64), "minutes": 30.0},
}


def run(config: dict[str, Any], workdir: str, python: str) -> None:
    """Measure and write."""
    from experiments import warm_start
    from plastic_jax import backend, benchmark, benchmark_report, dry_run, torch_ways
    from plastic_jax import workdir as files
    from plastic_jax.growth import growth
    from plastic_jax.trial_axis import Candidate

    trials, minutes = config.pop("trials"), config.pop("minutes")
    if not trials or any(isinstance(t, bool) or not isinstance(t, int) or not 1 <= t <= 4096 for t in trials):
        raise InputError(f"--config.trials={trials} is not allowed: whole numbers from 1 to 4096.")
    if not math.isfinite(minutes) or minutes <= 0:
        raise InputError(f"--config.minutes={minutes} is not allowed: a number above 0.")
    end = time.monotonic() + 60 * minutes
    backend.prepare()
    import jax

    jax.config.update("jax_enable_compilation_cache", False)  # or times to compile would be those of an earlier run
    points = benchmark.networks(config, jax.default_backend() == "gpu")
    for point in points:
        benchmark.check(point, trials)
    version = torch_ways.version(python)
    print(f"PyTorch {version}." if version else "No PyTorch: its rows are left out (pip install -e '.[torch]').")
    folder = Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--workdir={workdir} cannot be made ({error.strerror}): name another folder.") from None
    flops = dry_run.flops(warm_start.PAPER, warm_start.EXPERIMENT.fresh)
    found: dict[str, Any] = {"results": [], "growth": None, "left_out": [], "figure_2_flops": flops}
    found["date"] = datetime.date.today().isoformat()

    def save() -> None:
        files.write_json(folder / "throughput.json", found)
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
    first = Candidate("map", "products" if points[0].model == "resnet" else "plain", 1)
    found["growth"] = growth(points[0], first, jax.local_devices(), end - time.monotonic())
    save()
    print("Written: " + ", ".join(str(folder / f"throughput.{kind}") for kind in ("json", "md", "png")))


def main() -> None:
    """Read the flags."""
    from ml_collections import ConfigDict, config_flags

    sys.argv[:] = last_wins(sys.argv)
    for name in re.findall(r"^--?(?:no)?config\.([^=]*)", "\n".join(sys.argv[1:]), re.MULTILINE):
        if name not in FIELDS:
            refuse(f"--config.{name} is no field of this command: the fields are {', '.join(FIELDS)}.")
    flags.DEFINE_string("workdir", "runs/throughput", "where throughput.json, .md and .png are written")
    flags.DEFINE_string("torch_python", sys.executable, "the interpreter of an environment with PyTorch")
    config_flags.DEFINE_config_dict("config", ConfigDict(FIELDS), "its fields: " + ", ".join(FIELDS))

    def go(_: Any) -> None:
        logging.set_verbosity(logging.ERROR)
        try:
            run(flags.FLAGS.config.to_dict(), flags.FLAGS.workdir, flags.FLAGS.torch_python)
        except InputError as error:
            refuse(error)

    app.run(go, flags_parser=parse)


if __name__ == "__main__":
    main()

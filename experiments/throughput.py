"""Throughput: our core against what a user would run instead; no figure of the paper's.

    python -m experiments.throughput                                                # all networks, about half an hour
    python -m experiments.throughput --config.model=resnet --config.width=8 --config.trials='(1, 4, 16)'
    python -m experiments.throughput --torch_python=OTHER_ENVIRONMENT/bin/python    # PyTorch from elsewhere

Images a second over all trials, for our core in each formulation, for the obvious JAX program, for one trial at a time
in JAX, and for PyTorch's ways (extra `torch`; its rows are left out where it is missing). Written to --workdir (default
runs/throughput): throughput.json, throughput.md, throughput.png. Expected: on a CPU the obvious program is far behind.
"""

import datetime
import json
import math
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from plastic_jax.entry import last_wins, parse, refuse
from plastic_jax.errors import InputError

TRIALS, MINUTES = (1, 4, 16, 64), 30.0


def networks(given: dict[str, Any], gpu: bool) -> list[Any]:
    """The points to measure: one where a width is named, else the benchmark's own."""
    from plastic_jax.config import Config, Sweep

    values = {name: value for name, value in given.items() if value not in ((), "", 0)}
    mlp = dict(model="mlp", depth=2, norm="none", batch_size=128)
    resnet = dict(model="resnet", batch_size=128)
    own: list[dict[str, Any]] = [dict(mlp, width=100), dict(mlp, width=256), dict(resnet, width=8, batch_size=64)]
    own += [dict(resnet, width=width) for width in ((16, 32, 64) if gpu else (16,))]
    points = [dict(d) for d in own if d["model"] in values.get("model", ("mlp", "resnet"))]
    found = {Config(**{**vars(next(Sweep.of({**p, **values}).points()))}) for p in points}
    return sorted(found, key=lambda p: (p.model, p.width, p.batch_size))


def run(config: dict[str, Any], workdir: str, python: str) -> None:
    """Measure and write."""
    from plastic_jax import backend, benchmark, benchmark_report, torch_ways
    from plastic_jax import workdir as files
    from plastic_jax.growth import growth
    from plastic_jax.trial_axis import Candidate

    trials, minutes = config.pop("trials"), config.pop("minutes")
    if not trials or any(isinstance(t, bool) or not isinstance(t, int) or not 1 <= t <= 4096 for t in trials):
        raise InputError(f"--config.trials={trials} is not allowed: whole numbers from 1 to 4096.")
    if not math.isfinite(minutes) or minutes <= 0:
        raise InputError(f"--config.minutes={minutes} is not allowed: a number above 0.")
    backend.prepare()
    import jax

    points = networks(config, jax.default_backend() == "gpu")
    for point in points:
        benchmark.check(point, trials)
    version = torch_ways.version(python)
    print(f"PyTorch {version}." if version else "No PyTorch: its rows are left out (pip install -e '.[torch]').")
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    grown = None
    for point in points:
        share = minutes / len(points)
        results.append(benchmark.compare(point, tuple(trials), python if version else None, share, print))
        results[-1]["pytorch"] = version
        if grown is None:
            axis = Candidate("map", "products" if point.model == "resnet" else "plain", 1)
            grown = growth(point, axis, jax.local_devices())
        files.write_json(
            folder / "throughput.json", {"results": results, "growth": grown, "date": datetime.date.today().isoformat()}
        )
        benchmark_report.write(results, grown, folder)
        print(benchmark_report.markdown(results[-1]), flush=True)
    print("Written: " + ", ".join(str(folder / f"throughput.{kind}") for kind in ("json", "md", "png")))


def main() -> None:
    """Read the flags."""
    import sys

    from ml_collections import ConfigDict, config_flags

    flags.DEFINE_string("workdir", "runs/throughput", "where throughput.json, .md and .png are written")
    flags.DEFINE_string("torch_python", sys.executable, "the interpreter of an environment with PyTorch")
    fields: dict[str, Any] = dict(model=("mlp", "resnet"), width=(), batch_size=(), trials=TRIALS, minutes=MINUTES)
    config_flags.DEFINE_config_dict("config", ConfigDict(fields), json.dumps(fields))
    sys.argv[:] = last_wins(sys.argv)

    def go(_: Any) -> None:
        logging.set_verbosity(logging.ERROR)
        try:
            run(flags.FLAGS.config.to_dict(), flags.FLAGS.workdir, flags.FLAGS.torch_python)
        except InputError as error:
            refuse(error)

    app.run(go, flags_parser=parse)


if __name__ == "__main__":
    main()

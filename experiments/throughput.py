"""Throughput: our core against what a user would run instead; no figure of the paper's.

    python -m experiments.throughput                                                # all networks, about half an hour
    python -m experiments.throughput --config.model=resnet --config.width=8 --config.trials='(1, 4, 16)'
    python -m experiments.throughput --compile_for=h100                             # a GPU's launches, without a GPU
    python -m experiments.throughput --torch_python=OTHER_ENVIRONMENT/bin/python    # PyTorch from elsewhere

Images a second over all trials, for our core in each form, for the obvious JAX program, for one trial at a time
in JAX, and for PyTorch's ways (extra `torch`; its rows are left out where it is missing), all of a table's rows in one
dtype; on a GPU there is a table for float32 and one for bfloat16. --config.minutes bounds the whole, but for a program
that is being compiled. Written to --workdir (default runs/throughput): throughput.json, throughput.md, throughput.png.
Expected: on a CPU the obvious program is far behind. With --compile_for (h100 with the extra `cuda`, tpu-v5e with
`tpu`) nothing runs: a step of each form is compiled for that device, and its launches, bytes and memory are printed.
"""

import re
import sys
from typing import Any

from absl import app, flags, logging

from plastic_jax.errors import InputError
from plastic_jax.running.cli import asks_for_help, expanded, last_wins, parse, refuse, show

FIELDS: dict[str, Any] = {
    **dict.fromkeys(("model", "width", "depth", "batch_size", "optimizer", "compute_dtype"), ()),
    **{"trials": (1, 4, 16, 64), "minutes": 30.0},
}


def main() -> None:
    """Read the flags."""
    from ml_collections import ConfigDict, config_flags

    try:
        sys.argv[:] = last_wins(expanded(sys.argv))
    except InputError as error:
        refuse(error)
    if asks_for_help(sys.argv):
        show((__doc__ or "").strip() + "\n\nFields, --config.FIELD=VALUE: " + ", ".join(FIELDS))
        return
    for name in re.findall(r"^--?config\.([^=]*)", "\n".join(sys.argv[1:]), re.MULTILINE):
        if name not in FIELDS:
            refuse(f"--config.{name} is no field of this command: the fields are {', '.join(FIELDS)}.")
    flags.DEFINE_string("workdir", "runs/throughput", "where throughput.json, .md and .png are written")
    flags.DEFINE_string("compile_for", "", "h100 or tpu-v5e: count what a step does there, and measure nothing")
    flags.DEFINE_string("torch_python", sys.executable, "the interpreter of an environment with PyTorch")
    config_flags.DEFINE_config_dict("config", ConfigDict(FIELDS), "its fields: " + ", ".join(FIELDS))

    def go(_: Any) -> None:
        logging.set_verbosity(logging.ERROR)
        from plastic_jax import backend
        from plastic_jax.benchmarks import whole

        from . import warm_start

        backend.prepare()  # before anything asks JAX for its devices
        try:
            if flags.FLAGS.compile_for:
                whole.absent(flags.FLAGS.config.to_dict(), flags.FLAGS.compile_for)
                return
            config, paper, fresh = flags.FLAGS.config.to_dict(), warm_start.PAPER, warm_start.EXPERIMENT.fresh
            whole.run(config, flags.FLAGS.workdir, flags.FLAGS.torch_python, paper, fresh)
        except InputError as error:
            refuse(error)

    app.run(go, flags_parser=parse)


if __name__ == "__main__":
    main()

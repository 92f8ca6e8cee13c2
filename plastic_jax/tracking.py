"""W&B from a finished or killed workdir.

    python -m plastic_jax.tracking WORKDIR

writes the offline runs that `wandb sync` uploads; each is written once.
"""

import argparse
import sys
from collections.abc import Sequence

from plastic_jax.errors import InputError
from plastic_jax.report.wandb_offline import write_offline


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 if all runs are written, 1 if not, 2 if the argument is no workdir."""
    parser = argparse.ArgumentParser(
        prog="python -m plastic_jax.tracking",
        description="Write a workdir's W&B runs from its results table, each once, for wandb sync.",
    )
    parser.add_argument("workdir", help="the --workdir of a run, also of a killed one")
    parser.add_argument("--project", help="W&B project; default: the run's own")
    flags = parser.parse_args(arguments)
    try:
        return 0 if write_offline(flags.workdir, project=flags.project) else 1
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

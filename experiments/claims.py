"""A verdict on each of the paper's claims, from finished runs.

    python -m experiments.claims WORKDIR... [--out=FOLDER]

Reads the runs' folders, of any of the experiments, prints the table, and writes claims.json and claims.md. Each claim
is supported, refuted, undecided or not fitted, for the run's own model and data set, by the rules at the head of
plastic_jax/claims/rules.py. Takes seconds and trains nothing.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from plastic_jax.errors import InputError

_OUT = flags.DEFINE_string("out", "runs/claims", "the folder for claims.json and claims.md")


def judge(workdirs: Sequence[str], out: str) -> str:
    """Judge the runs in `workdirs`, write claims.json and claims.md into `out`, and return the table.

    Raises:
      InputError: no workdir, one that is named twice or cannot be judged, or a folder that cannot be written.
    """
    from plastic_jax.claims import evidence, rules, verdict_table, verdicts
    from plastic_jax.files import replace_file
    from plastic_jax.running import workdir

    if not workdirs:
        raise InputError("no workdir is named: python -m experiments.claims WORKDIR... takes at least one.")
    real = [os.path.realpath(path) for path in workdirs]
    if twice := [path for k, path in enumerate(workdirs) if real[k] in real[:k]]:
        raise InputError(f"{twice[0]} is named twice: each run counts once.")
    found = verdicts.judge([evidence.read(path) for path in workdirs])
    try:
        workdir.write_json(Path(out) / "claims.json", {"rules": rules.__doc__, **found})
        replace_file(Path(out) / "claims.md", verdict_table.markdown(found).encode())
    except OSError as error:
        raise InputError(f"--out={out} cannot be written ({error.strerror or error}): name another folder.") from None
    return verdict_table.terminal(found)


def _refuse(error: object) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        return _refuse(error) or []


def _main(argv: Sequence[str]) -> None:
    try:
        print(judge(argv[1:], _OUT.value))
        print(f"Written: {Path(_OUT.value) / 'claims.json'}, {Path(_OUT.value) / 'claims.md'}")
    except InputError as error:
        _refuse(error)


if __name__ == "__main__":
    app.run(_main, flags_parser=_parse)

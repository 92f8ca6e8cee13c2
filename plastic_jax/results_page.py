"""A page of results from finished workdirs, as it stands in docs/results.

    python -m plastic_jax.results_page WORKDIR... --out=docs/results/NAME.md

writes for each workdir its command, device, commit and seeds, the result in words, the gap table and the figures, which
are copied beside the page. Nothing in such a page is typed by hand.
"""

import argparse
import importlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from plastic_jax.claims import evidence
from plastic_jax.errors import InputError
from plastic_jax.files import replace_file
from plastic_jax.report import page
from plastic_jax.running import loading
from plastic_jax.running.experiment import Experiment
from plastic_jax.study import plugins

MARK = "<!-- written by python -m plastic_jax.results_page: not to be edited -->"


def find(name: str) -> Experiment | None:
    """The experiment of that name in this checkout or installation, None where there is none."""
    for room in ("experiments", "plastic_jax.experiments"):
        try:
            return importlib.import_module(f"{room}.{name}").EXPERIMENT if name.isidentifier() else None
        except (ModuleNotFoundError, AttributeError):
            continue
    return None


def section(workdir: str, out: Path) -> str:
    """One workdir's part of the page at `out`; copies its figures beside it.

    Raises:
      InputError: it is no finished run.
    """
    found, run = evidence.read(workdir, find), loading.load(workdir)
    config, held = run.config["config"], run.config
    first, last = config["first_seed"], config["first_seed"] + config["seeds"] - 1
    summary = list(found.summary.values())
    title = f"## {config['model']} on {config['dataset']}".replace("['", "").replace("']", "").replace("', '", ", ")
    lines = [
        title, "", *page.headlines(summary, found.setting), "",
        "```bash", held["command"], "```", "",
        f"{held['date']}, {held['device']}, commit {held['commit']}; seeds {first} to {last}.", "",
        "```text", page.terminal_table(summary, found.setting).rstrip(), "```", "",
    ]  # fmt: skip
    for figure in sorted((run.path / "figures").glob("*.png")):
        copy = out.with_name(f"{out.stem}_{run.path.name}_{figure.name}")
        shutil.copyfile(figure, copy)
        lines += [f"![{figure.stem.replace('_', ' ')}]({copy.name})", ""]
    return "\n".join(lines)


def write(workdirs: Sequence[str], out: Path) -> None:
    """Write the page.

    Raises:
      InputError: a workdir is no finished run, `out` was written by hand, or cannot be written.
    """
    if out.exists() and not out.read_text().startswith(MARK):
        raise InputError(f"--out={out} is not a page that this command wrote: name another file.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        parts = [section(workdir, out) for workdir in workdirs]
        names = {json.loads((Path(w) / "config.json").read_text())["experiment"] for w in workdirs}
        titles = [experiment.title for name in sorted(names) if (experiment := find(name))]
        replace_file(out, "\n".join([MARK, f"# {'; '.join(titles)}", "", *parts]).encode())
    except OSError as error:
        raise InputError(f"--out={out} cannot be written ({error.strerror or error}): name another file.") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m plastic_jax.results_page", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="the --workdir of a finished run")
    parser.add_argument("--out", required=True, type=Path, help="the page, a file that ends in .md")
    parser.add_argument("--plugin", action="append", default=[], help="as the runs had it")
    flags = parser.parse_args(arguments)
    try:
        plugins.load(flags.plugin)
        write(flags.workdirs, flags.out)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Written: {flags.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`plastic-jax NAME [flags]`: an installed experiment from anywhere, as `python -m experiments.NAME` in a checkout."""

import ast
import difflib
import importlib.resources
import runpy
import sys
from pathlib import Path

from plastic_jax.errors import InputError
from plastic_jax.running.cli import flag_values, refuse, show
from plastic_jax.running.cli import main as run
from plastic_jax.study import plugins

PACKAGE = "plastic_jax.experiments"


def experiments() -> dict[str, str]:
    """The experiments by name, with the first line of what each says of itself."""
    found = {}
    for file in sorted(Path(str(importlib.resources.files(PACKAGE))).glob("*.py")):
        if file.stem != "__init__":
            found[file.stem] = (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0]
    return found


def _of_a_plugin(name: str) -> None:
    """Run the experiment of that name which a plug-in has registered, if there is one, and end."""
    from plastic_jax.running.experiment import EXPERIMENTS

    try:
        plugins.load(flag_values(sys.argv, "plugin"))
    except InputError as error:
        refuse(error)
    if name in EXPERIMENTS:
        run(EXPERIMENTS[name], f"plastic-jax {name}")
        sys.exit()


def main() -> None:
    """Run the experiment that the first argument names."""
    known = experiments()
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        lines = [f"  {name:22} {line}" for name, line in known.items()]
        show(
            "\n".join(["plastic-jax NAME [flags]; NAME is one of", *lines, "plastic-jax NAME --help lists its flags."])
        )
        return
    name = sys.argv.pop(1)
    if name not in known:
        _of_a_plugin(name)
        near = difflib.get_close_matches(name, known, n=1)
        refuse(f"{name!r} is no experiment: " + (f"did you mean {near[0]}?" if near else "plastic-jax lists them."))
    runpy.run_module(f"{PACKAGE}.{name}", run_name="__main__", alter_sys=True)

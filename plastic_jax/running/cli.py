"""The command line of an experiment: flags, one sentence for bad input, exit code 2."""

import difflib
import re
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

from absl import app, flags, logging

from plastic_jax.errors import InputError
from plastic_jax.running.experiment import Experiment
from plastic_jax.study import plugins
from plastic_jax.study.config import FIELDS, Sweep, check_name

OWN = ("preset", "plugin", "config", "workdir", "data_dir", "dry_run", "overwrite", "wandb", "device_memory_gib")


def refuse(error: object) -> NoReturn:
    """Say what is wrong in one sentence and end with exit code 2."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


def _preset(argv: Sequence[str], presets: Sequence[str]) -> str:
    """The preset, read before all other flags, so that overrides win in any order."""
    found = presets[0]
    for k, argument in enumerate(argv):
        if match := re.fullmatch(r"--?preset(?:=(.*))?", argument):
            found = match[1] if match[1] is not None else argv[k + 1] if k + 1 < len(argv) else ""
    if found not in presets:
        raise InputError(f"--preset={found} is not allowed: one of {', '.join(presets)}.")
    return found


def _plugins(argv: Sequence[str]) -> list[str]:
    """The plug-ins' files, read before all other flags, since they add fields."""
    found = []
    for k, argument in enumerate(argv):
        if match := re.fullmatch(r"--?plugin(?:=(.*))?", argument):
            found.append(match[1] if match[1] is not None else argv[k + 1] if k + 1 < len(argv) else "")
    return found


def last_wins(argv: Sequence[str]) -> list[str]:
    """Without all but the last `--config.FIELD=...` of a field: ml_collections would join their tuples."""
    last = {a.split("=")[0].lstrip("-"): k for k, a in enumerate(argv) if re.match(r"--?config\.[^=]+=", a)}
    return [a for k, a in enumerate(argv) if last.get(a.split("=")[0].lstrip("-"), k) == k or "=" not in a]


def _define(experiment: Experiment, argv: Sequence[str]) -> None:
    from ml_collections import ConfigDict, config_flags

    plugins.load(_plugins(argv))
    for argument in argv[1:]:
        if match := re.match(r"--?(?:no)?config\.([^=]*)", argument):
            check_name(match[1])
    presets = list(experiment.presets)
    flags.DEFINE_enum("preset", presets[0], presets, "the fields' values before --config.FIELD=VALUE")
    flags.DEFINE_multi_string("plugin", [], "a Python file of your own that registers methods or models (repeatable)")
    flags.DEFINE_string("workdir", None, "the run's folder (default: runs/NAME-HASH); the same command goes on there")
    flags.DEFINE_string("data_dir", None, "folder of the data set's original files, or of TFDS")
    flags.DEFINE_bool("dry_run", False, "print and write the plan, train nothing")
    flags.DEFINE_bool("overwrite", False, "start anew in a workdir that holds a run")
    flags.DEFINE_string("wandb", "auto", "W&B: auto, online, offline, disabled")
    flags.DEFINE_float("device_memory_gib", 0.0, "plan for a device of this memory (0: the device at hand)")
    values = experiment.presets[_preset(argv, presets)]
    # Tuples throughout: ml_collections then takes `8`, `8,16` and `(8, 16)`; our own check does the rest.
    given = {name: values.get(name, spec.default) for name, spec in FIELDS.items()}
    tuples = {name: value if isinstance(value, tuple) else (value,) for name, value in given.items()}
    what = "--config.FIELD=VALUE or --config.FIELD='(VALUE, VALUE)' for the fields " + ", ".join(FIELDS)
    config_flags.DEFINE_config_dict("config", ConfigDict(tuples), what)
    for name in OWN:  # so that --help shows them
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])


def _check_arguments(argv: Sequence[str]) -> None:
    for argument in argv[1:]:
        if argument.startswith("-") and not re.match(r"--?(?:no)?config\.", argument):
            name = re.sub(r"^--?|=.*$", "", argument)
            known = [*flags.FLAGS, *(f"no{n}" for n in flags.FLAGS)]
            if name and name not in known:
                near = difflib.get_close_matches(name, [*flags.FLAGS, *(f"config.{n}" for n in FIELDS)], n=1)
                hint = f": did you mean --{near[0]}?" if near else "; --help lists them."
                raise InputError(f"--{name} is no flag{hint}")


def parse(argv: Sequence[str]) -> list[str]:
    """Absl's parser of flags, with one sentence for what it can't read."""
    try:
        _check_arguments(argv)
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise InputError(f"{rest[1]!r} is no flag: values go into --config.FIELD=VALUE.")
        return rest
    except (flags.Error, InputError) as error:
        refuse(error)
    except (ValueError, TypeError, SyntaxError, KeyError, AttributeError) as error:
        refuse(f"the flags cannot be read: {error}")


def main(experiment: Experiment) -> None:
    """Run an experiment from the command line."""
    try:
        sys.argv[:] = last_wins(sys.argv)
        _define(experiment, sys.argv)
    except InputError as error:
        refuse(error)

    def run(_: Sequence[str]) -> None:
        f = flags.FLAGS
        try:
            sweep = Sweep.of(f.config.to_dict())
        except InputError as error:  # said before the slow imports
            refuse(error)
        from plastic_jax.running.options import Options
        from plastic_jax.running.runner import run_experiment
        from plastic_jax.running.training import Interrupted

        module = sys.modules["__main__"].__spec__
        name = f"-m {module.name}" if module else sys.argv[0]
        command = f"python {name} {shlex.join(sys.argv[1:])}".strip()
        options = Options(f.workdir, f.data_dir, f.dry_run, f.overwrite, f.wandb, f.device_memory_gib, command)
        try:
            logging.set_verbosity(logging.ERROR)
            run_experiment(experiment, sweep, options, lambda text: print(text, flush=True))
        except InputError as error:
            refuse(error)
        except KeyboardInterrupt:
            print("Interrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
            sys.exit(130)
        except Interrupted as signal_name:
            print(f"Interrupted by {signal_name}; the same command goes on from the checkpoint.", file=sys.stderr)
            sys.exit(130)

    app.run(run, flags_parser=parse)

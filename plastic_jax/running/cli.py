"""The command line of an experiment: flags, one sentence for bad input, exit code 2."""

import difflib
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from plastic_jax.errors import InputError
from plastic_jax.running.experiment import Experiment
from plastic_jax.study import plugins
from plastic_jax.study.config import FIELDS, Sweep, check_name

OWN = {
    "preset": "the fields' values before --config.FIELD=VALUE",
    "plugin": "a Python file of your own that registers methods or models (repeatable)",
    "workdir": "the run's folder (default: runs/NAME-HASH); the same command continues there",
    "data_dir": "folder of the data set's original files, or of TFDS",
    "dry_run": "print and write the plan, train nothing",
    "overwrite": "start anew in a workdir that holds a run",
    "wandb": "W&B: auto, online, offline, disabled",
    "device_memory_gib": "plan for a device of this memory (0: the device at hand)",
    "flagfile": "a file with further flags, one a line",
}
KINDS = {
    "static": "Static fields: several values make several compiled programs",
    "dynamic": "Dynamic fields: any number of values in one compiled program",
    "run": "Fields of the whole run: one value",
}


def refuse(error: object) -> NoReturn:
    """Say what is wrong in one sentence and end with exit code 2."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


def show(text: str) -> None:
    """Print; end quietly if the reader stops reading (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end


def help_text(experiment: Experiment, doc: str) -> str:
    """What `--help` prints: the experiment, its own flags, and a few lines a field."""

    def entry(name: str, words: str) -> str:
        return textwrap.fill(words, 116, initial_indent=f"  {name}\n      ", subsequent_indent="      ")

    parts = [doc.strip(), "\nFlags:\n"]
    presets = ", ".join(experiment.presets)
    parts += [entry(f"--{name}", words + f": {presets}" * (name == "preset")) for name, words in OWN.items()]
    for kind, title in KINDS.items():
        parts.append(f"\n{title}; --config.FIELD=VALUE" + (", or =VALUE,VALUE:\n" if kind != "run" else ":\n"))
        for name, field in FIELDS.items():
            if field.kind == kind:
                parts.append(entry(name, f"{field.doc}. Default {field.default!r}; {field.allowed()}."))
    return "\n".join(parts)


def flag_values(argv: Sequence[str], name: str) -> list[str]:
    """The values of one of our own flags, which are read before all others."""
    found = []
    for k, argument in enumerate(argv):
        if match := re.fullmatch(rf"--?{name}(?:=(.*))?", argument):
            found.append(match[1] if match[1] is not None else argv[k + 1] if k + 1 < len(argv) else "")
    return found


def expanded(argv: Sequence[str]) -> list[str]:
    """The arguments with those of --flagfile in its place."""
    try:
        return [argv[0], *flags.FLAGS.read_flags_from_files(list(argv[1:]), force_gnu=True)]
    except flags.Error as error:
        raise InputError(str(error).splitlines()[0]) from None


def last_wins(argv: Sequence[str], switches: Sequence[str] = ()) -> list[str]:
    """One `--config.FIELD=VALUE` a field, the last one that was given, whatever its spelling.

    (ml_collections would join the values of a field that is named twice.) `switches` are fields of True or False, which
    may stand without a value, or as --noconfig.FIELD.
    """
    rest, values, k = [argv[0]], {}, 1
    while k < len(argv):
        match = re.fullmatch(r"--?(no)?config\.([^=]+)(=.*)?", argv[k], re.DOTALL)
        k += 1
        if not match:
            rest.append(argv[k - 1])
            continue
        no, name, value = match.groups()
        values.pop(name, None)
        if no:
            values[name] = "False"
        elif value is not None:
            values[name] = value[1:]
        elif name in switches and not (k < len(argv) and re.fullmatch(r"(?i)true|false", argv[k])):
            values[name] = "True"
        elif k < len(argv):
            values[name] = argv[k]
            k += 1
        else:
            raise InputError(f"--config.{name} needs a value: --config.{name}=VALUE.")
    return [*rest, *(f"--config.{name}={value}" for name, value in values.items())]


def _define(experiment: Experiment, argv: Sequence[str]) -> None:
    from ml_collections import ConfigDict, config_flags

    for argument in argv[1:]:
        if match := re.match(r"--?config\.([^=]*)", argument):
            check_name(match[1])
    presets = list(experiment.presets)
    preset = (flag_values(argv, "preset") or presets)[-1 if flag_values(argv, "preset") else 0]
    if preset not in presets:
        raise InputError(f"--preset={preset} is not allowed: one of {', '.join(presets)}.")
    flags.DEFINE_enum("preset", presets[0], presets, OWN["preset"])
    flags.DEFINE_multi_string("plugin", [], OWN["plugin"])
    flags.DEFINE_string("workdir", None, OWN["workdir"])
    flags.DEFINE_string("data_dir", None, OWN["data_dir"])
    flags.DEFINE_bool("dry_run", False, OWN["dry_run"])
    flags.DEFINE_bool("overwrite", False, OWN["overwrite"])
    flags.DEFINE_string("wandb", "auto", OWN["wandb"])
    flags.DEFINE_float("device_memory_gib", 0.0, OWN["device_memory_gib"])
    values = experiment.presets[preset]
    # Tuples throughout: ml_collections then takes `8`, `8,16` and `(8, 16)`; our own check does the rest.
    given = {name: values.get(name, field.default) for name, field in FIELDS.items()}
    tuples = {name: value if isinstance(value, tuple) else (value,) for name, value in given.items()}
    config_flags.DEFINE_config_dict("config", ConfigDict(tuples), "--config.FIELD=VALUE")


def _check_arguments(argv: Sequence[str]) -> None:
    for argument in argv[1:]:
        if argument.startswith("-") and not re.match(r"--?config\.", argument):
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


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether one of the arguments asks for help, in any of absl's spellings."""
    return any(re.fullmatch(r"-h|--?help(full|short)?(=true)?", argument) for argument in argv[1:])


def recorded(argv: Sequence[str], program: str = "") -> str:
    """The command as it can be given again; `program` is what stands before its flags, if that is not Python."""
    module = sys.modules["__main__"].__spec__
    program = program or f"python {f'-m {module.name}' if module else argv[0]}"
    return f"{program} {shlex.join(argv[1:])}".strip()


def interrupted(run: Callable[[], Any]) -> None:
    """Run; a request to stop ends with a sentence and exit code 130."""
    try:
        run()
    except InputError as error:
        refuse(error)
    except KeyboardInterrupt as error:
        said = str(error) or "Interrupted; the same command continues from the last checkpoint."
        print(said, file=sys.stderr)
        sys.exit(130)


def main(experiment: Experiment, program: str = "") -> None:
    """Run an experiment from the command line; `program` as in `recorded`."""
    given = list(sys.argv)
    try:
        sys.argv[:] = expanded(sys.argv)
        plugins.load(flag_values(sys.argv, "plugin"))
        if asks_for_help(sys.argv):
            show(help_text(experiment, sys.modules["__main__"].__doc__ or experiment.title))
            return
        sys.argv[:] = last_wins(sys.argv, [name for name, field in FIELDS.items() if field.type is bool])
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

        options = Options(
            f.workdir, f.data_dir, f.dry_run, f.overwrite, f.wandb, f.device_memory_gib, recorded(given, program)
        )
        logging.set_verbosity(logging.ERROR)
        interrupted(lambda: run_experiment(experiment, sweep, options, show))

    app.run(run, flags_parser=parse)

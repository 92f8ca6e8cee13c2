"""The command line's spellings, help and hints, and what is installed."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import plastic_jax
from plastic_jax.errors import InputError
from plastic_jax.running.cli import last_wins
from plastic_jax.running.experiment import EXPERIMENTS
from plastic_jax.study import trial
from plastic_jax.study.config import FIELDS, Config, Sweep

ROOT = Path(__file__).parents[1]
ROOMS = ("plastic_jax", "experiments", "launch")
DRY = ["--dry_run", "--wandb=disabled", "--config.seeds=2", "--config.width=4"]


def called(*arguments, cwd=ROOT, command=("-m", "experiments.warm_start"), **more):
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *command, *arguments], capture_output=True, text=True, timeout=200, cwd=cwd, env=env, **more
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "given",
    [
        ["--config.width=8", "--config.width=16"],
        ["--config.width", "8", "--config.width", "16"],
        ["--config.width=8", "-config.width", "16"],
        ["--config.width=8", "--dry_run", "-config.width=16"],
    ],
)
def test_a_field_that_is_named_twice_takes_the_last_value_in_every_spelling(given):
    found = last_wins(["x", *given], ["decoupled"])
    assert found[-1] == "--config.width=16" and "--config.width=8" not in found and "8" not in found
    assert ("--dry_run" in found) == ("--dry_run" in given)


def test_switches_stand_alone_or_with_a_value():
    for given, value in (
        (["--config.decoupled"], "True"), (["--noconfig.decoupled"], "False"), (["--config.decoupled=False"], "False"),
        (["--config.decoupled", "false"], "false"), (["--config.decoupled", "--config.width=3"], "True"),
    ):  # fmt: skip
        assert f"--config.decoupled={value}" in last_wins(["x", *given], ["decoupled"])
    with pytest.raises(InputError, match=r"--config\.width needs a value"):
        last_wins(["x", "--config.width"], [])


def test_flags_may_come_from_files(tmp_path):
    inner, outer = tmp_path / "inner", tmp_path / "outer"
    inner.write_text("--config.width=4\n# a comment\n--config.depth\n3\n")
    outer.write_text(f"--preset=quickstart\n--flagfile={inner}\n--config.seeds=2\n")
    run = tmp_path / "run"
    code, out, err = called(f"--flagfile={outer}", "--dry_run", "--config.depth=1", f"--workdir={run}")
    assert code == 0, err
    assert "2 seeds" in out and '"width": 4' in (run / "plan.json").read_text()
    assert '"depth": 1' in (run / "plan.json").read_text()
    code, _, err = called(f"--flagfile={tmp_path / 'none'}")
    assert code == 2 and "Traceback" not in err and err.count("\n") == 1 and "none" in err


def test_help_says_meaning_default_and_what_is_allowed_of_every_field(tmp_path):
    code, out, _ = called("--help")
    assert code == 0 and "!!python" not in out
    for name, field in FIELDS.items():
        entry = " ".join(re.search(rf"^  {name}\n((?:      .*\n?)+)", out, re.MULTILINE)[1].split())
        assert entry == " ".join(f"{field.doc}. Default {field.default!r}; {field.allowed()}.".split())
    piped = f"{sys.executable} -m experiments.warm_start --help | head -1"
    reader = subprocess.run(piped, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert reader.stdout.startswith("The warm-start study") and reader.stderr == ""


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optimizer": "adamw"}, "optimizer=adam with decoupled=True and a weight_decay"),
        ({"optimizer": "moment"}, "did you mean momentum?"),
        ({"norm": "btach"}, "did you mean batch?"),
        ({"learning_rat": 1.0}, "did you mean learning_rate?"),
    ],
)
def test_what_was_perhaps_meant_is_said(values, words):
    with pytest.raises(InputError, match=re.escape(words)):
        Sweep.of(values)


def test_a_value_without_effect_is_said_once_and_an_effective_one_is_not():
    import tiny

    def said(**changes):
        return " ".join(trial.without_effect(tiny.study(**changes)))

    assert said() == ""
    assert said(decoupled=True).count("decoupled=True has no effect") == 1
    assert said(decoupled=True, weight_decay=(0.0, 0.1)) == ""
    assert "reset=1 has no effect" in said(reset="1", warm_start_epochs=0)
    assert said(reset="1") == "" and "batch_stats=restart" in said(batch_stats="restart", norm="none")
    assert "gamma=(0.1, 0.2)" in said(gamma=(0.1, 0.2))


def test_a_refused_command_leaves_no_folder(tmp_path):
    for arguments in (
        ["--config.dataset=cifar10", f"--data_dir={tmp_path / 'none'}"],
        ["--config.train_examples=99999"],
    ):
        code, _, err = called(*arguments, f"--workdir={tmp_path / 'a' / 'b' / 'run'}", "--wandb=disabled")
        assert code == 2 and "Traceback" not in err, err
        assert not (tmp_path / "a").exists()


def test_python_names_fields_without_the_shells_marks(tmp_path):
    for config, word in (({"width": 0}, "width=0 is not allowed"), ({"wdith": 3}, "did you mean width?")):
        with pytest.raises(InputError) as error:
            plastic_jax.run(config, tmp_path / "run")
        assert str(error.value).startswith(next(iter(config))) and word in str(error.value)
    with pytest.raises(TypeError, match="overwrit"):
        plastic_jax.run({}, tmp_path / "run", overwrit=True)  # pyright: ignore
    assert not (tmp_path / "run").exists()


def test_reprs_are_short():
    import tiny

    assert repr(Config(width=3)) == "Config(width=3)" and repr(Sweep.of({"width": (3, 4)})) == "Sweep(width=[3, 4])"
    assert repr(tiny.study()) == "Study(3 arms, 6 trials, swept: warm_start_epochs)"


# Installed


def test_every_room_is_installed_and_nothing_beside_the_package(tmp_path):
    """A wheel built from the checkout, without a network."""
    source = tmp_path / "source"
    left = shutil.ignore_patterns(".git", "*.egg-info", "__pycache__", "runs", "build", ".*")
    shutil.copytree(ROOT, source, ignore=left)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"plastic_jax"}
    files = {
        room: [f for f in (ROOT / room).rglob("*") if f.is_file() and "__pycache__" not in f.parts] for room in ROOMS
    }
    wanted = {str(f.relative_to(ROOT)) for f in files["plastic_jax"]}
    wanted |= {f"plastic_jax/{f.relative_to(ROOT)}" for room in ROOMS[1:] for f in files[room]}
    assert wanted <= set(names) and "plastic_jax/py.typed" in names


def test_the_list_of_packages_is_whole():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(f.parent.relative_to(ROOT).parts) for f in (ROOT / "plastic_jax").rglob("__init__.py")}
    assert set(listed) == found | {"plastic_jax.experiments", "plastic_jax.launch"}


def test_an_installed_experiment_runs_from_anywhere(tmp_path):
    command = ("-c", "from plastic_jax.running.command import main; main()")
    code, out, err = called(cwd=tmp_path, command=command)
    assert code == 0, err
    for file in (ROOT / "experiments").glob("[a-z]*.py"):
        assert file.stem in out and (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0] in out
    code, out, err = called("capacity", *DRY, f"--workdir={tmp_path / 'run'}", cwd=tmp_path, command=command)
    assert code == 0 and "Nothing was trained" in out, err
    code, _, err = called("capacty", cwd=tmp_path, command=command)
    assert code == 2 and "did you mean capacity?" in err and "Traceback" not in err


def test_an_experiment_of_a_plugin_runs_by_its_name(tmp_path):
    command = ("-c", "from plastic_jax.running.command import main; main()")
    (tmp_path / "idea.py").write_text(
        "import plastic_jax as pj\n"
        "PRESET = dict(dataset='digits', model='mlp', width=8, depth=1, warm_start_epochs=(0, 2), tuning_epochs=3,\n"
        "              metric_epochs=1, seeds=2)\n"
        "pj.register(pj.Experiment(name='mine', title='My own question', presets={'small': PRESET}))\n"
    )
    asked = ["mine", "--plugin=idea.py", "--wandb=disabled", "--workdir=run"]
    code, out, err = called(*asked, cwd=tmp_path, command=command)
    assert code == 0 and "My own question" in (tmp_path / "run" / "report.html").read_text(), err
    held = json.loads((tmp_path / "run" / "config.json").read_text())
    assert held["command"] == "plastic-jax mine --plugin=idea.py --wandb=disabled --workdir=run"
    assert [(p["kind"], p["name"]) for p in held["plugins"]] == [("experiment", "mine")] and held[
        "experiment"
    ] == "mine"
    code, out, err = called(*asked, cwd=tmp_path, command=command)
    assert code == 0 and "Compiling" not in out, err
    code, out, err = called("mine", "--plugin=idea.py", "--help", cwd=tmp_path, command=command)
    assert code == 0 and "My own question" in out and "--preset" in out, err
    code, _, err = called("mien", "--plugin=idea.py", cwd=tmp_path, command=command)
    assert code == 2 and "'mien' is no experiment" in err
    code, _, err = called("mine", cwd=tmp_path, command=command)
    assert code == 2 and "'mine' is no experiment" in err


def test_run_takes_an_experiment_by_name(tmp_path):
    config = dict(dataset="digits", model="mlp", width=8, depth=1, tuning_epochs=3, metric_epochs=1, seeds=2)
    made = plastic_jax.run(
        config | {"warm_start_epochs": 2, "reset": ("none", "2")}, tmp_path, study="module_reset", wandb="disabled",
        say=lambda _: None, progress=False,
    )  # fmt: skip
    assert made is not None and made.config["experiment"] == "module_reset" and len(made.summary) == 3
    with pytest.raises(InputError, match=r"experiment is 'module_rest'; it must be one of warm_start, .*online"):
        plastic_jax.run(config, tmp_path / "other", study="module_rest")


def test_every_experiment_is_a_file_and_a_word():
    files = {f.stem for f in (ROOT / "experiments").glob("[a-z]*.py")} - {"claims", "throughput"}  # commands
    assert set(EXPERIMENTS) == files
    assert all(EXPERIMENTS[name].name == name for name in EXPERIMENTS)


def test_an_experiment_of_ones_own_runs_from_anywhere(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from plastic_jax.running.cli import main\nfrom plastic_jax.running.experiment import Experiment\n"
        "PRESET = dict(dataset='digits', model='mlp', warm_start_epochs=(0, 2), tuning_epochs=3, metric_epochs=1)\n"
        "if __name__ == '__main__':\n    main(Experiment(name='mine', presets={'small': PRESET}))\n"
    )
    code, out, err = called("mine.py", *DRY, cwd=tmp_path, command=())
    assert code == 0 and "2 arms x 2 seeds" in out, err

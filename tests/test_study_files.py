"""Study files outlive the code: new fields and columns, changed code and analysis, damaged files, unfinished runs."""

import json
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest

import plastic_jax
from experiments.warm_start import EXPERIMENT, QUICKSTART
from plastic_jax import data
from plastic_jax.errors import InputError
from plastic_jax.fields import Field
from plastic_jax.results import tables
from plastic_jax.running import manifest, training
from plastic_jax.running.checkpoint import Checkpoints
from plastic_jax.study import plan, trial
from plastic_jax.study.config import FIELDS, Sweep, add_fields
from plastic_jax.train import program
from plastic_jax.train.trial_axis import Formulation

CONFIG = dict(
    QUICKSTART, train_examples=60, width=8, depth=1, batch_size=10, warm_start_epochs=(0, 2, 4), tuning_epochs=6,
    metric_epochs=2, seeds=3, keep="ends",
)  # fmt: skip


def trained(folder: Path, said: list | None = None, **changes) -> plastic_jax.load:
    say = (lambda _: None) if said is None else said.append
    made = plastic_jax.run(
        {**CONFIG, **changes},
        folder,
        study=EXPERIMENT,
        wandb="disabled",
        say=say,
        progress=False,
        command="the command",
    )
    assert made is not None
    return made


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "finished"
    trained(folder)
    return folder


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory) -> Path:
    """Stopped at its second checkpoint."""
    folder = tmp_path_factory.mktemp("study") / "unfinished"
    real, saves = training.Training._save, []

    def save(self, checkpoints, live):
        real(self, checkpoints, live)
        saves.append(live)
        if len(saves) == 2:
            checkpoints.wait()
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Training, "_save", save)
        with pytest.raises(KeyboardInterrupt):
            trained(folder, checkpoint_minutes=1e-6)
    return folder


@pytest.fixture
def copy(tmp_path):
    def of(folder: Path) -> Path:
        shutil.copytree(folder, tmp_path / "copy")
        return tmp_path / "copy"

    return of


def changed(folder: Path, change) -> None:
    held = json.loads((folder / "config.json").read_text())
    change(held)
    (folder / "config.json").write_text(json.dumps(held))


def fingerprint(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != ".lock"}


def test_config_json_says_its_schema_version_code_and_commit(finished):
    held = json.loads((finished / "config.json").read_text())
    assert held["schema"] == manifest.SCHEMA == 2 and held["code"] == manifest.code() and len(held["code"]) == 64
    assert {"plastic_jax", "jax"} <= held["versions"].keys() and held["command"] == "the command"


def test_a_field_that_is_new_counts_as_its_default(finished, copy, monkeypatch):
    folder = copy(finished)
    changed(folder, lambda held: held["config"].pop("label_noise"))  # as if it had been declared since
    with pytest.raises(InputError, match=r"label_noise was 0\.0, is now 0\.2"):
        trained(folder)
    add_fields({"brand_new": Field(3, "dynamic", "a field that is new")}, "a test")
    try:
        folder = shutil.copytree(finished, folder.with_name("other"))
        assert len(trained(folder).summary) == 3
        with pytest.raises(InputError, match="brand_new was 3, is now 4"):
            trained(folder, brand_new=4)
    finally:
        del FIELDS["brand_new"]


def test_a_field_that_there_is_no_more_is_named(finished, copy):
    folder = copy(finished)
    changed(folder, lambda held: held["config"].update(strange_strength=0.5))
    before = fingerprint(folder)
    with pytest.raises(InputError, match=r"strange_strength=0.5, a field that does not exist here.*plug-in"):
        trained(folder)
    assert fingerprint(folder) == before


def test_a_newer_schema_is_refused(finished, copy):
    folder = copy(finished)
    for text in (None, '{"schema": 99}'):  # whatever else it has
        changed(folder, lambda held: held.update(schema=99)) if text is None else (folder / "config.json").write_text(
            text
        )
        before = fingerprint(folder)
        for ask in (lambda: trained(folder), lambda: plastic_jax.load(folder)):
            with pytest.raises(InputError, match=r"newer version of plastic_jax.*schema 99"):
                ask()
        assert fingerprint(folder) == before


def test_a_description_of_another_plan_is_not_rebuilt(unfinished, copy, monkeypatch):
    folder = copy(unfinished)
    (folder / "plan.json").unlink()
    before = fingerprint(folder)
    real = plan.programs
    monkeypatch.setattr(plan, "programs", lambda study: real(study) * 2)
    with pytest.raises(InputError, match="laid out differently"):
        trained(folder)
    assert fingerprint(folder) == before


def test_a_column_that_is_new_is_null(finished, copy):
    folder = copy(finished)
    table = pd.read_parquet(folder / "results.parquet")
    table.drop(columns=["test_loss"]).to_parquet(folder / "results.parquet")
    read = tables.read(folder / "results.parquet")
    assert read.test_loss.isna().all() and len(read) == len(table) and read.test_accuracy.notna().any()
    table.drop(columns=["step"]).to_parquet(folder / "results.parquet")
    with pytest.raises(InputError, match="lacks step"):
        tables.read(folder / "results.parquet")


def test_changed_code_is_said_and_the_numbers_stay(finished, copy):
    folder, said = copy(finished), []
    same = trained(folder, said)
    assert not any("other code" in text for text in said) and "other code" not in (folder / "report.html").read_text()
    table = (folder / "results.parquet").read_bytes()
    changed(folder, lambda held: held.update(code="0" * 64, commit="abc123"))
    trained(folder, said)
    (sentence,) = [text for text in said if "other code" in text]
    assert "abc123" in sentence and str(manifest.commit()) in sentence and "--overwrite" in sentence
    assert "Trained by other code" in (folder / "report.html").read_text()
    assert (folder / "results.parquet").read_bytes() == table and same.finished


def test_another_analysis_is_no_other_run(finished, copy, unfinished, tmp_path):
    folder, said = copy(finished), []
    table = (folder / "results.parquet").read_bytes()
    before = {arm["arm"]: arm["test_accuracy"] for arm in plastic_jax.load(folder).summary}
    run = trained(folder, said, metric_epochs=5, checkpoint_minutes=7.0)
    assert (folder / "results.parquet").read_bytes() == table
    for arm in run.summary:
        rows = run.table[(run.table.arm == arm["arm"]) & (run.table.stage == "tuning") & (run.table.epoch > 1)]
        assert arm["test_accuracy"] == pytest.approx(rows.groupby("trial").test_accuracy.mean().mean())
    assert any(arm["test_accuracy"] != before[arm["arm"]] for arm in run.summary)
    assert run.config["config"]["metric_epochs"] == 5 and run.config["analysed"]["metric_epochs"] == 5
    assert "last 5 epochs" in (folder / "report.html").read_text()
    with pytest.raises(InputError, match="metric_epochs=7 is not allowed"):
        trained(folder, metric_epochs=7)
    going_on = shutil.copytree(unfinished, tmp_path / "unfinished")
    assert trained(going_on, metric_epochs=5).summary == run.summary


DAMAGE = {
    "truncated": lambda file: file.write_text(file.read_text()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_text(""),
    "gone": Path.unlink,
    "garbage": lambda file: file.write_bytes(bytes(range(256))),
    "other": lambda file: file.write_text('{"experiment": 3, "config": [], "programs": [{"formulation": {"x": 1}}]}'),
    "a list": lambda file: file.write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["config.json", "plan.json"])
@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_a_damaged_description_is_rebuilt_from_the_checkpoint(state, name, damage, finished, unfinished, copy):
    folder, said = copy(finished if state == "finished" else unfinished), []
    file = folder / name
    DAMAGE[damage](file)
    with pytest.raises(InputError, match="another config"):
        trained(folder, learning_rate=0.5)
    run = trained(folder, said)
    assert any("rebuilt" in text for text in said)
    assert (folder / "results.parquet").read_bytes() == (finished / "results.parquet").read_bytes()
    assert run.config["config"] == {**json.loads((finished / "config.json").read_text())["config"], **(
        {"checkpoint_minutes": 1e-6} if state == "unfinished" else {}
    )}  # fmt: skip
    plan = json.loads((folder / "plan.json").read_text())
    expected = json.loads((finished / "plan.json").read_text())
    for made, begun in zip(plan["programs"], expected["programs"], strict=True):
        assert all(made[name] == begun[name] for name in ("formulation", "batches", "idle_share", "bytes_per_device"))
    assert run.config["trials"] == plastic_jax.load(finished).config["trials"]


def test_without_checkpoint_and_description_nothing_is_touched(finished, copy):
    folder = copy(finished)
    shutil.rmtree(folder / "checkpoints")
    (folder / "config.json").write_text("{")
    before = fingerprint(folder)
    with pytest.raises(InputError, match=r"holds results.parquet.*no readable config.json"):
        trained(folder)
    assert fingerprint(folder) == before


@pytest.mark.parametrize("left", ["no checkpoints", "damaged ones"])
def test_a_finished_run_needs_no_checkpoint(left, finished, copy):
    folder, said = copy(finished), []
    table = (folder / "results.parquet").read_bytes()
    if left == "no checkpoints":
        shutil.rmtree(folder / "checkpoints")
    else:
        for file in (folder / "checkpoints" / "run").rglob("*"):
            if file.is_file():
                file.write_bytes(b"damaged")
    run = trained(folder, said, metric_epochs=3)
    assert (folder / "results.parquet").read_bytes() == table and run.finished
    assert run.config["analysed"]["metric_epochs"] == 3 and not any("damaged" in text for text in said)
    before = fingerprint(folder)
    (folder / "results.parquet").write_bytes(table[:100])
    with pytest.raises(
        InputError, match=r"finished run whose results.parquet is damaged|all checkpoints.*are damaged"
    ) as e:
        trained(folder, metric_epochs=3)
    assert "--overwrite" not in str(e.value)
    (folder / "results.parquet").write_bytes(table)
    assert fingerprint(folder) == before


def test_a_checkpoints_checksum_is_there_as_soon_as_it_is_finished(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save({"a": np.arange(5)}, {"b": 1})
    limit = time.monotonic() + 60
    while not (tmp_path / "run.json").exists() and time.monotonic() < limit:  # nobody waits for it
        time.sleep(0.01)
    assert json.loads((tmp_path / "run.json").read_text()).keys() == {"0"}
    (tmp_path / "run" / "0" / "more").write_text("damage")
    said: list[str] = []
    with pytest.raises(InputError, match=r"all checkpoints in .* are damaged: restore one"):
        checkpoints.restore(said.append)
    checkpoints.close()
    assert "damaged (ValueError)" in said[0]


def test_a_finished_runs_damaged_table_comes_from_its_checkpoint(finished, copy):
    folder = copy(finished)
    table = (folder / "results.parquet").read_bytes()
    (folder / "results.parquet").write_bytes(table[:100])
    trained(folder)
    assert (folder / "results.parquet").read_bytes() == table


def test_a_run_continued_under_other_code_says_so(unfinished, finished, copy):
    folder, said = copy(unfinished), []
    changed(folder, lambda held: held.update(code="0" * 64, commit=None))
    run = trained(folder, said)
    (sentence,) = [text for text in said if "other code" in text]
    assert "plastic_jax 0.1.0" in sentence and "what is left is trained by this one" in sentence
    (again,) = run.config["resumed"]
    assert again["code"] == manifest.code() and again["plugins"] == []
    assert "Begun by other code" in (folder / "report.html").read_text()
    said.clear()
    trained(folder, said)
    assert not any("other code" in text for text in said)


def test_states_of_another_layout_are_refused_in_a_sentence(unfinished, copy, monkeypatch):
    folder = copy(unfinished)
    before = fingerprint(folder)
    for name, value in (("fingerprint", 1), ("fits", lambda self, arrays, host: False)):
        with monkeypatch.context() as patch:
            patch.setattr(plan.ProgramPlan if name == "fingerprint" else program.ProgramRun, name, value)
            with pytest.raises(InputError, match=r"unfinished run of other code \(.*laid out differently"):
                trained(folder)
        assert fingerprint(folder) == before


def test_whether_states_fit_is_seen_leaf_by_leaf(unfinished, finished):
    checkpoints = Checkpoints(unfinished / "checkpoints" / "run")
    found = checkpoints.restore(print)
    checkpoints.close()
    assert found is not None
    arrays, host = found[0], found[1]["program"]
    sweep = Sweep.of(CONFIG)
    study = trial.study(sweep, {"digits": data.spec("digits")}, EXPERIMENT.fresh)
    (whole,) = plan.programs(study)
    form = Formulation(**json.loads((unfinished / "plan.json").read_text())["programs"][0]["formulation"])
    live = program.ProgramRun(whole, data.load("digits"), form, jax.local_devices(), 1, "ends")
    assert live.fits(arrays, host)
    name = sorted(arrays["state"])[0]
    assert not live.fits({"state": {**arrays["state"], name: arrays["state"][name][:, :1]}}, host)
    assert not live.fits({"state": {**arrays["state"], name: arrays["state"][name].astype("float64")}}, host)
    assert not live.fits({"state": {n: v for n, v in arrays["state"].items() if n != name}}, host)
    assert not live.fits(arrays, {**host, "slots": host["slots"][1:]})


def test_an_analysis_that_was_broken_off_is_unfinished(finished, copy, monkeypatch):
    folder = copy(finished)

    def dies(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.page, "page", dies)
        with pytest.raises(KeyboardInterrupt):
            trained(folder, metric_epochs=4)
    with pytest.raises(InputError, match="unfinished"):
        _ = plastic_jax.load(folder).summary
    run = trained(folder, metric_epochs=4)
    assert run.finished and "pending" not in run.config["analysed"]
    assert "Analysed again on" in (folder / "report.html").read_text() and "jax" in run.config["analysed"]["versions"]


def test_load_refuses_what_it_cannot_read(finished, copy):
    folder = copy(finished)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="`the command` rebuilds it from the checkpoint"):
        plastic_jax.load(folder)
    trained(folder)
    index = folder / "checkpoints" / "kept" / "0" / "index.json"
    for text in ("{", "3", '{"models": [[1]]}', '{"other": 1}'):
        index.write_text(text)
        with pytest.raises(InputError, match=r"index.json is damaged"):
            plastic_jax.load(folder).model(0)
    changed(folder, lambda held: held.update(schema=99))
    with pytest.raises(InputError, match="newer version of plastic_jax"):
        plastic_jax.load(folder)


def test_an_unfinished_run_says_so_and_how_to_go_on(unfinished, finished):
    run = plastic_jax.load(unfinished)
    assert not run.finished and repr(run).endswith(", unfinished)") and len(run.table) > 0
    for ask in (lambda: run.summary, lambda: run.model(0)):
        with pytest.raises(InputError) as error:
            ask()
        assert "unfinished" in str(error.value) and "the command" in str(error.value)
        assert "--overwrite" not in str(error.value) and "damaged" not in str(error.value)
    whole = plastic_jax.load(finished)
    assert whole.finished and repr(whole) == f"Run({str(finished)!r})"
    rows = run.table.merge(whole.table, on=[*whole.table.columns[:1], "stage", "step"], suffixes=("", "_whole"))
    assert len(rows) == len(run.table) and (rows.test_loss == rows.test_loss_whole).all()


def test_a_kept_model_has_the_runs_own_values(finished):
    point = plastic_jax.load(finished).model(0).point
    assert (point.seeds, point.metric_epochs, point.keep, point.width) == (3, 2, "ends", 8)
    fresh = plastic_jax.load(finished).model(0).point
    assert (fresh.warm_start_epochs, fresh.batch_stats, fresh.label_noise) == (0, "carry", 0.2)
    assert repr(plastic_jax.load(finished).model(0)) == "Kept(mlp, width 8, depth 1)"


def test_the_default_folder_is_the_same_when_fields_are_added():
    from plastic_jax.running.runner import default_workdir

    before = default_workdir("warm_start", Sweep.of(CONFIG))
    assert default_workdir("warm_start", Sweep.of({**CONFIG, "metric_epochs": 3})) == before
    assert default_workdir("warm_start", Sweep.of({**CONFIG, "width": 9})) != before
    add_fields({"brand_new": Field(3, "dynamic", "a field that is new")}, "a test")
    try:
        assert default_workdir("warm_start", Sweep.of(CONFIG)) == before
    finally:
        del FIELDS["brand_new"]

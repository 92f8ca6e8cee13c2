"""Study files outlive the code: new fields and columns, changed code and analysis, damaged files, unfinished runs."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

import plastic_jax
from experiments.warm_start import EXPERIMENT, QUICKSTART
from plastic_jax.errors import InputError
from plastic_jax.fields import Field
from plastic_jax.results import tables
from plastic_jax.running import manifest, training
from plastic_jax.study.config import FIELDS, add_fields

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
    changed(folder, lambda held: held.update(schema=99))
    with pytest.raises(InputError, match="newer version of plastic_jax"):
        trained(folder)


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


@pytest.mark.parametrize("damage", ["truncated", "empty", "gone", "garbage"])
@pytest.mark.parametrize("name", ["config.json", "plan.json"])
@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_a_damaged_description_is_rebuilt_from_the_checkpoint(state, name, damage, finished, unfinished, copy):
    folder, said = copy(finished if state == "finished" else unfinished), []
    file = folder / name
    text = file.read_text()
    {
        "truncated": lambda: file.write_text(text[: len(text) // 2]),
        "empty": lambda: file.write_text(""),
        "gone": file.unlink,
        "garbage": lambda: file.write_bytes(bytes(range(256))),
    }[damage]()
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
    assert [p["formulation"] for p in plan["programs"]] == [p["formulation"] for p in expected["programs"]]
    assert run.config["trials"] == plastic_jax.load(finished).config["trials"]


def test_without_checkpoint_and_description_nothing_is_touched(finished, copy):
    folder = copy(finished)
    shutil.rmtree(folder / "checkpoints")
    (folder / "config.json").write_text("{")
    before = fingerprint(folder)
    with pytest.raises(InputError, match=r"holds results.parquet.*no readable config.json"):
        trained(folder)
    assert fingerprint(folder) == before


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
    assert repr(plastic_jax.load(finished).model(0)) == "Kept(mlp, width 8, depth 1)"


def test_the_default_folder_is_the_same_when_fields_are_added():
    from plastic_jax.running.runner import default_workdir
    from plastic_jax.study.config import Sweep

    before = default_workdir("warm_start", Sweep.of(CONFIG))
    assert default_workdir("warm_start", Sweep.of({**CONFIG, "metric_epochs": 3})) == before
    assert default_workdir("warm_start", Sweep.of({**CONFIG, "width": 9})) != before
    add_fields({"brand_new": Field(3, "dynamic", "a field that is new")}, "a test")
    try:
        assert default_workdir("warm_start", Sweep.of(CONFIG)) == before
    finally:
        del FIELDS["brand_new"]

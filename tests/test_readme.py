"""README, docs and the lock file say what is there: commands, flags, modules, links, versions."""

import ast
import itertools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from experiments import throughput
from plastic_jax.errors import InputError
from plastic_jax.running import cli, flags_table
from plastic_jax.study.config import FIELDS

ROOT = Path(__file__).parents[1]
README, ARCHITECTURE, CONFIG = (
    (ROOT / name).read_text() for name in ("README.md", "docs/architecture.md", "docs/config.md")
)
PACKAGE = ROOT / "plastic_jax"
DOORS = ("data", "data/sets", "kernels", "models", "methods/optimisers", "methods/diagnostics", "methods/interventions")
DOCUMENTS = sorted(str(f.relative_to(ROOT)) for f in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_the_table_of_flags_is_the_configs():
    assert flags_table.rewritten(CONFIG) == CONFIG, "run: python -m plastic_jax.running.flags_table"


def test_the_table_has_a_row_of_five_cells_for_each_field():
    rows = flags_table.markdown().splitlines()
    assert [re.match(r"\| `(\w+)` ", row)[1] for row in rows[2:]] == list(FIELDS)
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6}


@pytest.mark.parametrize(
    "text", ["", "<!-- flags -->", "<!-- /flags --><!-- flags -->", "<!-- flags --><!-- /flags -->" * 2]
)
def test_marks_that_are_not_there_once_are_refused(text):
    with pytest.raises(InputError, match="once each"):
        flags_table.rewritten(text)


def test_the_commands_stand_as_they_are_run():
    fenced = "\n".join(re.findall(r"^```bash\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)).splitlines()
    assert "pip install -e . && python -m experiments.warm_start" in fenced
    assert "pip install -e '.[test]' && pytest" in fenced


def test_every_flag_is_explained():
    text = "".join((ROOT / name).read_text() for name in DOCUMENTS)
    assert "dry_run" in cli.OWN
    assert [flag for flag in cli.OWN if f"`--{flag}" not in text] == []


def test_named_fields_exist():
    named = re.findall(r"--config\.(\w+)", "".join((ROOT / name).read_text() for name in DOCUMENTS))
    assert named and [name for name in named if name not in {*FIELDS, *throughput.FIELDS, "FIELD"}] == []


def anchors(text: str) -> set[str]:
    """The names that headings can be linked by."""
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_relative_link_leads_somewhere(name):
    text = (ROOT / name).read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        here = (ROOT / name).parent / file
        assert not file or here.exists(), link
        assert not anchor or anchor in anchors(here.read_text() if file else text), link


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_number_is_left_open(name):
    assert re.findall(r"@@\w+@@", (ROOT / name).read_text()) == []


@pytest.mark.parametrize("name", ["README.md", "RESULTS.md"])
def test_every_estimate_stands_on_a_page_of_results(name):
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "results").glob("*.md"))
    estimates = re.findall(r"[+-]\d+\.\d\d \[[+-][\d.]+, [+-][\d.]+\]", (ROOT / name).read_text())
    assert len(estimates) >= 6 and [estimate for estimate in estimates if estimate not in pages] == []


def imports(file: Path) -> set[str]:
    """The project's modules that a file imports, wherever in it, as the table names them: `data/__init__`."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    paths = {name.partition(".")[2].replace(".", "/") for name in names if name.startswith("plastic_jax.")}
    rooms = {path for path in paths if (PACKAGE / path / "__init__.py").is_file() and PACKAGE / path != file.parent}
    doors = {f"{room}/__init__" for room in rooms & set(DOORS)}
    return {path for path in paths if (PACKAGE / f"{path}.py").is_file()} | doors


def test_architecture_names_every_module_and_imports_run_one_way():
    """Each module imports only modules that stand above it in the table of docs/architecture.md."""
    table = ARCHITECTURE.partition("| room | module |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (?:\*\*(\w+)\*\*.*?)? ?\| `([\w/]+)\.py` \|", table, re.MULTILINE)
    listed = [name for _, name in rows]
    files = {file.relative_to(PACKAGE).with_suffix("").as_posix(): file for file in PACKAGE.rglob("*.py")}
    files = {name: file for name, file in files.items() if file.stem != "__init__" or str(Path(name).parent) in DOORS}
    assert sorted(listed) == sorted(files)
    rooms = [name.partition("/")[0] for name in listed if "/" in name]
    assert [room for room, _ in itertools.groupby(rooms)] == list(dict.fromkeys(rooms))  # each room stands in one place
    assert [r for r in (room for room, _ in rows if room) if r not in ("basics", "commands")] == list(
        dict.fromkeys(rooms)
    )
    for position, name in enumerate(listed):
        assert imports(files[name]) - {*listed[:position]} == set(), name
    # or this test sees nothing
    assert imports(files["train/program"]) >= {"study/plan", "train/trial_axis", "study/config"}
    assert imports(files["data/__init__"]) >= {"data/originals", "data/builders"}


def test_the_lock_file_holds_every_dependency_and_no_address():
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    locked = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for requirement in map(Requirement, [*project["dependencies"], *extras["test"], *extras["dev"]]):
        name = canonicalize_name(requirement.name)
        assert name == "plastic-jax" or requirement.specifier.contains(locked[name]), requirement


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if "<!-- run -->" in (ROOT / name).read_text()])
def test_examples_run_as_they_stand(name, tmp_path):
    """The blocks marked `run` of a document, one after another, in a process of their own."""
    text = (ROOT / name).read_text()
    blocks = re.findall(r"^<!-- run -->\n```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == text.count("<!-- run -->")  # a mark before anything else would run nothing
    (tmp_path / "example.py").write_text("\n".join(blocks))
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr


def test_an_example_is_written_somewhere():
    assert "<!-- run -->" in (ROOT / "CONTRIBUTING.md").read_text()

"""README and the lock file say what is there: commands, flags, modules, links, versions."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from experiments import throughput
from plastic_jax.errors import InputError
from plastic_jax.running import flags_table
from plastic_jax.study.config import FIELDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PACKAGE = ROOT / "plastic_jax"
DOORS = ("data", "kernels", "models", "methods/optimisers", "methods/diagnostics", "methods/interventions")
DOCUMENTS = ["README.md", "RESULTS.md", "CONTRIBUTING.md", "CHANGELOG.md"]


def test_the_table_of_flags_is_the_configs():
    assert flags_table.rewritten(README) == README, "run: python -m plastic_jax.running.flags_table"


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
    flags = re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', (PACKAGE / "running" / "cli.py").read_text())
    assert "dry_run" in flags
    assert [flag for flag in flags if f"`--{flag}" not in README] == []


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
        assert not file or (ROOT / file).exists(), link
        assert not anchor or anchor in anchors((ROOT / file).read_text() if file else text), link


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_number_is_left_open(name):
    assert re.findall(r"@@\w+@@", (ROOT / name).read_text()) == []


def imports(file: Path) -> set[str]:
    """The project's modules that a file imports, wherever in it, as README names them: `data/__init__`."""
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
    """Each module imports only modules that stand above it in README's table."""
    table = README.partition("| module |")[2].partition("\n\n")[0]
    listed = re.findall(r"^\| `([\w/]+)\.py` \|", table, re.MULTILINE)
    files = {file.relative_to(PACKAGE).with_suffix("").as_posix(): file for file in PACKAGE.rglob("*.py")}
    files = {name: file for name, file in files.items() if file.stem != "__init__" or str(Path(name).parent) in DOORS}
    assert sorted(listed) == sorted(files)
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

"""The words and the page: terminal table, headlines, HTML."""

import base64
import html.parser
import re
from pathlib import Path

import numpy as np
import pytest
from report_sweep import made
from synthetic import pair_table, two_arms

from plastic_jax.report import page
from plastic_jax.results import summaries
from plastic_jax.results.settings import Setting


@pytest.fixture(scope="module")
def sweep():
    return made()


def make_page(workdir: Path, summary: list[dict], setting: Setting, **changes) -> str:
    given = {
        "title": "Warm-start length",
        "figures": [],
        "config": {"width": 64, "optimizer": ["adam", "sgd"], "inner": {"rate": 1e-3}},
        "versions": {"jax": "0.10.2"},
        "device": "2 x cpu",
        "command": "python -m experiments.length",
        "notes": [],
    }
    path = page.page(workdir, summary=summary, setting=setting, **(given | changes))
    assert path == workdir / "report.html"
    return path.read_text()


# Words


def test_terminal_table_shows_every_arm_in_points_and_100_columns(sweep):
    _, summary, setting = sweep
    text = page.terminal_table(summary, setting)
    assert text.isascii() and max(map(len, text.splitlines())) <= 100
    body = [line for line in text.splitlines() if line.startswith(("adam", "rmsprop", "sgd"))]
    assert len(body) == len(summary)
    row = summary[-1]
    low, high = (100 * bound for bound in row["gap_ci95"])
    assert f"{100 * row['gap']:+.2f} [{low:+.2f}, {high:+.2f}]" in body[-1]
    assert f"{100 * row['gap_equal_updates']:+.2f} [" in body[-1]
    assert re.match(r"sgd +40 +5 +[\d.]+ +96\.0 ", body[-1]) and body[-1].endswith("not fitted")
    assert body[0].endswith("fresh") and "diverged" not in text
    summary = [row | {"diverged": 1} for row in summary]
    assert "diverged" in page.terminal_table(summary, setting)


@pytest.mark.parametrize(
    ("warm", "changes", "expected"),
    [
        (
            (0.79, 0.789, 0.788),
            {},
            "After a warm start of 4 epochs, the network generalises worse than a fresh one: test "
            "accuracy is 1.10 percentage points lower (95 % interval 0.85 to 1.35, 3 paired "
            "seeds).",
        ),
        (
            (0.81, 0.811, 0.812),
            {},
            "After a warm start of 4 epochs, the network generalises better than a fresh one: test "
            "accuracy is 1.10 percentage points higher (95 % interval 0.85 to 1.35, 3 paired "
            "seeds).",
        ),
        (
            (0.79, 0.80, 0.81),
            {"gap": 0.0},
            "no difference from a fresh network can be told: the gap is +0.00 percentage points "
            "(95 % interval \u22122.48 to +2.48, 3 paired seeds).",
        ),
        (
            (0.79, 0.789, 0.788),
            {"verdict": "not fitted"},
            "do not fit their training data, so this does not count: the gap is \u22121.10",
        ),
        ((0.79, 0.789, 0.788), {"verdict": None}, "too many trials diverged to judge"),
        ((0.79,), {}, "the gap is \u22121.00 percentage points from 1 pair, too few to judge."),
        ((0.79, 0.77), {}, "the gap is \u22122.00 percentage points from 2 pairs, too few"),
        ((), {}, "After a warm start of 4 epochs, no pair of trials has finished yet."),
        (
            (0.79, 0.789, 0.788),
            {"gap_equal_updates": -0.01, "gap_equal_updates_ci95": [-0.02, 0.005]},
            "after as many updates: \u22121.00 [\u22122.00, +0.50] points.",
        ),
    ],
)
def test_headline_says_the_result_in_words(warm, changes, expected):
    summary = summaries.summary(pair_table([0.8] * 3, [*warm]), two_arms())
    summary[1] |= changes
    (sentence,) = page.headlines(summary, two_arms())
    assert expected in sentence


def test_headlines_take_the_longest_warm_start_and_count_when_there_are_many(sweep):
    _, summary, setting = sweep
    sentences = page.headlines(summary, setting)
    assert [s.split(", ")[0] for s in sentences] == [
        f"After a warm start of 40 epochs (optimizer={o})" for o in ("adam", "rmsprop", "sgd")
    ]
    verdicts = ("worse", "worse", "better", "undecided", None)
    arms = tuple({"arm": f"gamma={g}", "gamma": g} for g in range(6))
    summary = [
        arm | {"verdict": verdict, "gap": gap}
        for arm, verdict, gap in zip(arms, (None, *verdicts), (None, -0.02, -0.01, 0.01, 0.0, None), strict=True)
    ]
    setting = Setting(("gamma",), arms, {arm["arm"]: "gamma=0" for arm in arms}, 1, False)
    assert page.headlines(summary, setting) == [
        "Of 5 arms 2 generalise worse than their fresh arm, 1 generalise better, 1 cannot be told "
        "from it, 1 have no verdict yet. Gaps from \u22122.00 to +1.00 points."
    ]


# The page


class Reader(html.parser.HTMLParser):
    """Collects text and attributes, and checks that tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.images: list[dict] = []
        self.references: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        self.references += [v for k, v in attrs if k in ("href", "src") and not v.startswith("data:")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read_page(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_page_stands_alone_and_holds_everything(sweep, tmp_path):
    table, summary, setting = sweep
    made = page.save_figure(page.gap_curve(table, summary, setting), tmp_path, "gap", 'The "gap" & its <interval>')
    html = make_page(tmp_path, summary, setting, figures=[made], notes=["A note."])
    reader = read_page(html)
    text = " ".join("".join(reader.text).split())
    assert reader.references == [] and "@import" not in html and "url(" not in html
    (image,) = reader.images
    prefix = "data:image/png;base64,"
    assert image["src"].startswith(prefix) and image["alt"] == 'The "gap" & its <interval>'
    assert base64.b64decode(image["src"][len(prefix) :]) == made.path.read_bytes()
    for sentence in page.headlines(summary, setting):
        assert sentence in text
    for piece in (
        *("Warm-start length", "A note.", "2 x cpu", "python -m experiments.length"),
        *("width64", 'optimizer["adam", "sgd"]', "inner.rate0.001", "jax0.10.2"),
        *("not fitted", "at equal updates", "last 10 epochs"),
    ):
        assert piece in text
    assert html.count("<tr") == 1 + len(summary)
    for row in summary[1:4]:
        low, high = (f"{100 * b:+.2f}".replace("-", "\u2212") for b in row["gap_ci95"])
        assert f"[{low}, {high}]" in html
    assert "bootstrap" not in html
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "report.html"]


def test_page_escapes_what_it_is_given(tmp_path):
    setting = two_arms()
    summary = summaries.summary(pair_table([0.8], [0.7]), setting)
    bad = "<script>alert('x')</script>&amp;"
    html = make_page(
        tmp_path,
        summary,
        setting,
        **{key: bad for key in ("title", "device", "command")},
        notes=[bad],
        config={bad: bad},
        versions={bad: bad},
    )
    assert "<script" not in html
    assert "".join(read_page(html).text).count(bad) == 9  # the title stands twice
    assert "Notes" not in make_page(tmp_path, summary, setting)


def test_page_shows_the_bootstrap_where_there_is_one(tmp_path):
    warm = 0.79 + 0.001 * np.arange(20)
    summary = summaries.summary(pair_table([0.8] * 20, [*warm]), two_arms())
    low, high = summary[1]["gap_bootstrap_ci95"]
    html = make_page(tmp_path, summary, two_arms())
    cell = f"[{100 * low:+.2f}, {100 * high:+.2f}]".replace("-", "\u2212")
    assert f">{cell}</td>" in html and "bootstrap beside them" in html
    assert "at equal updates" not in html.lower()

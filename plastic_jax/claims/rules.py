"""The paper's claims as data, and the rules by which a finished run supports or refutes them.

Written down before the runs, and kept in claims.json beside the verdicts.

**What is judged.** Each claim within each combination of the fields that it does not speak of (data set, model, label
noise, ...): one row each. Every quantity is one number a seed: a *gap* is an arm's test accuracy minus its fresh
arm's, of the same seed. Trials that diverged leave the pairs. Where a claim leaves the number of pretraining epochs
open, it is judged at the run's largest one. Tests are t tests over seeds, each with 95 % intervals.

**What supports and what refutes** a claim, by its kind. One-sided tests at 2.5 %, which says the same as the 95 %
interval:

- *Superiority* ("below", "a gap", "not zero"). Supported: the interval lies below the threshold, 0. Refuted: it lies
  above. A small gap is not refuted by being small, only by being of the other sign.
- *Equivalence* ("recovers", "no gain in speed", "both at 100 %"). Supported: the interval lies within the margins (two
  one-sided tests), 0.5 points of accuracy or a factor of 0.9 to 1.1 of the epochs. Refuted: it lies wholly outside, on
  the side that contradicts the claim (below the fresh accuracy, below 100 %, faster). Outside on the other side:
  undecided.
- *"Do not recover"* is the complement: supported where the interval lies below -0.5 points, refuted where above.
- *"At every"*: several of the above at once (intersection-union). Supported: each is, on its own. Refuted: one is, with
  Bonferroni's correction for there being several. Shown is the least favourable one.
- *"Monotone"*: the linear trend over the ordered levels, per seed. Supported: the trend's interval lies below 0.
  Refuted: it lies above 0, or a step between two neighbouring levels goes the other way (Bonferroni over the trend and
  all steps). The second wins where both hold.
- *"Much smaller"*: at least half of the gap is gone. The gap at x10 minus half of that at x1, paired by seed, lies
  above 0 (supported) or below (refuted).

**Conditions.** Neither verdict without them. Every arm's mean fit is at least 99 %, else *not fitted* (but for the
claim about fit itself); at least 3 pairs, and at most a tenth of an arm's trials diverged. *Recovery* and *much
smaller* take for granted that there is a gap to recover from: without a reset below -0.5 points, at x1 below 0. The
*early* gap takes for granted that pretraining ended below 99.5 % train accuracy. These are tested at the same level,
within the row. A claim that names its levels (all four optimisers, the head alone, the last 4 and the last 5 modules)
is not supported without them. A trend of fewer than three levels (the fresh arm is one, at 0 stages) and an "at every"
of fewer than two are not judged.

**What the paper leaves open**, and is fixed here: "small subsets" are one or two of the six modules, and networks with
another number of modules are not judged on figures 6 and 11; "5-10 epochs" is the longest pretraining from 5 to 10;
epochs are compared by their ratio, a geometric mean over seeds; levels of a trend count as equally spaced; figures 1
and 2 are about Adam, figure 4 left about r = 1.

**Several rows.** Each row has two p-values, one of the test whose rejection supports it and one of the test whose
rejection refutes it. Holm's correction runs over both p-values of all rows of the table; rows that cannot be judged
count with p = 1. A verdict takes an adjusted p-value of at most 0.05. So the probability of any false verdict in the
table is at most 5 %, as far as t tests hold. Intervals are not adjusted: beside "undecided" one may exclude 0.

**Beside the verdict**, and no part of it: the same effect against the fresh arm at equal updates.

**Censored epochs** (figure 11): a trial that never saw 99 % train accuracy counts with bounds: its epochs are more than
those trained. So does one that is not evaluated every epoch: it got there after the evaluation before the one that saw
it. Each test takes the bound that makes a rejection harder, so that coarse epochs decide nothing by themselves.

**Seeds needed**: for 80 % power of this row's tests together, with the measured spread, conditions left out. For a gap
the size is 1.3 points, the smaller of the two sizes known for Adam (paper: figure 1). Trends: 1.3 points from the first
level to the last. Not recovering: 1.3 points, 0.8 beyond the margin. Much smaller, not zero: a gap of 1.3 of which a
quarter is left, 0.325 points beyond either threshold. Equivalence: no difference at all, and the margins above.
`seeds_needed` is for a table of this row alone, `seeds_needed_in_table` for the first step of this table's correction.

**Scope.** A verdict is about its own model and data set. It is about the paper's setting (`scope` "paper") only where
every field, the claim's own levels too, has a value of the experiment's preset `paper`, and none a control's, such as a
falling learning rate. No MLP refutes a claim about a ResNet.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from plastic_jax.claims.evidence import Evidence
from plastic_jax.claims.measures import (
    EARLY,
    FEW_MODULES,
    MARGIN,
    MODULES,
    WARM,
    Levels,
    Measured,
    Values,
    early,
    fits,
    gaps,
    halved,
    recovery,
    speed,
    trend,
)
from plastic_jax.study.config import reset_modules

ALPHA = 0.05  # of the whole table
SPEED_MARGINS = (float(np.log(0.9)), float(np.log(1.1)))  # of the logarithm of the ratio of epochs
POWER = 0.8
GAP = 0.013  # the reference: ReScience 2021, ResNet-18 on CIFAR-10 with Adam, 80.3 -> 79.0
LEFT = 0.25  # share of it that is left at x10, for the number of seeds


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    `level`: of an arm's values, the level of the claim that it is, or None for no part of it. `fields`: those that the
    claim speaks of; it is judged within each combination of the others. `bounds`: of the effect's mean, in its unit;
    `distance`: between the size expected and the finite bound (for the number of seeds; 0: no effect expected).
    `needs`: levels without which it is not supported; with fewer levels than `fewest` it is not judged. `longest`:
    only arms with the most pretraining epochs count. `falls`: levels in descending order. `paper`: the paper's own
    value of a field of which the preset holds controls too.
    """

    name: str
    figure: str
    experiment: str
    text: str
    fields: tuple[str, ...]
    level: Callable[[Values], Any]
    measure: Callable[[Evidence, Levels], Measured]
    bounds: tuple[float, float] = (-np.inf, 0.0)
    distance: float = GAP
    needs: frozenset[Any] = frozenset()
    fewest: int = 1
    longest: bool = False
    falls: bool = False
    needs_fit: bool = True
    unit: str = "points"
    source: str = "paper"
    paper: Mapping[str, Any] = field(default_factory=dict)


def _has_six(values: Values) -> bool:
    return values["model"] == "resnet" or values["depth"] + 1 == MODULES


def _reset_level(wanted: Callable[[frozenset[int]], bool]) -> Callable[[Values], frozenset[int] | None]:
    def level(values: Values) -> frozenset[int] | None:
        found = frozenset(reset_modules(values["reset"] or "none"))
        return found if _has_six(values) and wanted(found) else None

    return level


def _rate(*factors: float) -> Callable[[Values], float | None]:
    def level(values: Values) -> float | None:
        factor = values["tuning_learning_rate_factor"]
        return factor if values[WARM] and factor in factors else None

    return level


LAST = frozenset({frozenset({3, 4, 5, 6}), frozenset({2, 3, 4, 5, 6})})  # the last 4, and the last 5


CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="warm-below-fresh",
        figure="1",
        experiment="warm_start",
        text="pretrained below fresh",
        fields=(WARM, "optimizer"),
        level=lambda v: (v[WARM] or None) if v["optimizer"] == "adam" else None,
        measure=gaps(WARM),
        longest=True,
    ),
    Claim(
        name="both-fit",
        figure="1",
        experiment="warm_start",
        text="pretrained and fresh both at 100 % train accuracy",
        fields=(WARM, "optimizer"),
        level=lambda v: (v[WARM] or None) if v["optimizer"] == "adam" else None,
        measure=fits,
        bounds=(-MARGIN, MARGIN),
        distance=0.0,
        longest=True,
        needs_fit=False,
    ),
    Claim(
        name="early-gap",
        figure="2",
        experiment="warm_start",
        text="a gap already after 5-10 epochs with Adam, before train accuracy is 100 %",
        fields=(WARM, "optimizer"),
        level=lambda v: v[WARM] if v["optimizer"] == "adam" and EARLY[0] <= (v[WARM] or 0) <= EARLY[1] else None,
        measure=early,
    ),
    Claim(
        name="every-optimiser",
        figure="2, 8-10",
        experiment="warm_start",
        text="pretrained below fresh with each of the four optimisers",
        fields=(WARM, "optimizer"),
        level=lambda v: v["optimizer"] if v[WARM] else None,
        measure=gaps("optimizer", WARM),
        fewest=2,
        needs=frozenset({"adam", "rmsprop", "sgd", "momentum"}),
        longest=True,
    ),
    Claim(
        name="every-gamma",
        figure="3",
        experiment="smooth_transition",
        text="a gap for every gamma of a smooth transition",
        fields=("gamma", "transition", WARM),
        level=lambda v: v["gamma"] if v["transition"] == "smooth" and v["gamma"] else None,
        measure=gaps("gamma"),
        fewest=2,
    ),
    Claim(
        name="falls-with-stages",
        figure="4 left",
        experiment="multi_stage",
        text="test accuracy falls monotonically with the number of pretraining stages",
        fields=("pretraining_stages", "uniform_fraction"),
        level=lambda v: v["pretraining_stages"] or None if v.get("uniform_fraction") in (None, 1.0) else None,
        measure=trend("pretraining_stages", from_fresh=True),
        fewest=2,
    ),
    Claim(
        name="imbalance-widens",
        figure="4 right",
        experiment="multi_stage",
        text="the smaller the uniform fraction r, the larger the gap",
        fields=("uniform_fraction",),
        level=lambda v: v.get("uniform_fraction") if v["pretraining_stages"] else None,
        measure=trend("uniform_fraction", from_fresh=False),
        fewest=3,
        falls=True,
    ),
    Claim(
        name="every-size",
        figure="5",
        experiment="capacity",
        text="a gap at every depth and width",
        fields=("depth", "width", WARM),
        level=lambda v: (v["depth"], v["width"]) if v[WARM] else None,
        measure=gaps("depth", "width"),
        fewest=2,
        longest=True,
    ),
    Claim(
        name="late-reset-recovers",
        figure="6",
        experiment="module_reset",
        text="resetting the last 4 or 5 of 6 modules recovers the fresh accuracy",
        fields=("reset", WARM),
        level=_reset_level(lambda m: not m or m in LAST),
        measure=recovery,
        bounds=(-MARGIN, MARGIN),
        distance=0.0,
        needs=LAST,
        longest=True,
    ),
    Claim(
        name="small-resets-do-not",
        figure="6",
        experiment="module_reset",
        text="resetting one or two modules, the head alone included, does not recover it",
        fields=("reset", WARM),
        level=_reset_level(lambda m: len(m) <= FEW_MODULES),
        measure=recovery,
        bounds=(-np.inf, -MARGIN),
        distance=GAP - MARGIN,
        needs=frozenset({frozenset({MODULES})}),
        longest=True,
    ),
    Claim(
        name="faster-tuning-shrinks",
        figure="7",
        experiment="tuning_learning_rate",
        text="a 10 times larger tuning learning rate makes the gap much smaller",
        fields=("tuning_learning_rate_factor", WARM),
        level=lambda v: (
            v["tuning_learning_rate_factor"] if v["tuning_learning_rate_factor"] in (1, 10) and v[WARM] else None
        ),
        measure=halved,
        bounds=(0.0, np.inf),
        distance=GAP * (0.5 - LEFT),
        fewest=2,
        longest=True,
        paper={"schedule": "constant"},
    ),
    Claim(
        name="faster-tuning-leaves-a-gap",
        figure="7",
        experiment="tuning_learning_rate",
        text="a 10 times larger tuning learning rate does not make the gap zero",
        fields=("tuning_learning_rate_factor", WARM),
        level=lambda v: (
            v["tuning_learning_rate_factor"] if v["tuning_learning_rate_factor"] == 10 and v[WARM] else None
        ),
        measure=gaps("tuning_learning_rate_factor"),
        distance=GAP * LEFT,
        longest=True,
        paper={"schedule": "constant"},
    ),
    Claim(
        name="no-gain-in-speed",
        figure="11",
        experiment="module_reset",
        text="keeping modules 1 or 1-2 and resetting the rest gains no speed to 99 % train accuracy",
        fields=("reset", WARM),
        level=_reset_level(lambda m: m in LAST),
        measure=speed,
        bounds=SPEED_MARGINS,
        distance=0.0,
        longest=True,
        unit="ratio",
    ),
    Claim(
        name="online-warm-below-fresh",
        figure="A&A",
        experiment="online",
        text="online, warm below fresh",
        fields=("intervention",),
        level=lambda v: "none" if v["intervention"] in (None, "none") else None,
        measure=gaps("intervention"),
        source="A&A",
    ),
)
"""The rows "expected" of the paper's figures, and Ash & Adams' online setting."""

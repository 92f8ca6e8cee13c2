"""A study small enough to be trained many times over: noise images, an MLP, a few steps."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from plastic_jax.data import Dataset, DatasetSpec
from plastic_jax.results import rows, settings
from plastic_jax.study import plan, trial
from plastic_jax.study.config import FIELDS, Sweep
from plastic_jax.train.core import Core
from plastic_jax.train.program import ProgramRun
from plastic_jax.train.state import Sample, Stage, State, Sums, resident
from plastic_jax.train.trial_axis import Formulation

SPEC = DatasetSpec("noise", 50, 30, (4, 4, 1), 5)
CONFIG: dict[str, Any] = dict(
    dataset="noise",
    model="mlp",
    width=8,
    depth=2,
    norm="batch",
    batch_size=8,
    learning_rate=0.01,
    warm_start_epochs=(0, 2, 5),
    tuning_epochs=4,
    metric_epochs=2,
    seeds=2,
)


def dataset(spec: DatasetSpec = SPEC) -> Dataset:
    draw = np.random.default_rng(7)
    images = [draw.integers(0, 256, (n, *spec.shape), np.uint8) for n in (spec.train_examples, spec.test_examples)]
    labels = [draw.integers(0, spec.classes, n).astype(np.int32) for n in (spec.train_examples, spec.test_examples)]
    return Dataset(spec, images[0], labels[0], images[1], labels[1])


def study(fresh: dict[str, Any] | None = None, spec: DatasetSpec = SPEC, **changes: Any) -> trial.Study:
    sweep = Sweep.of({**CONFIG, **changes})
    return trial.study(sweep, {"noise": spec}, {"warm_start_epochs": 0} if fresh is None else fresh)


def programs(of: trial.Study, formulation: Formulation, devices: int = 1, **more: Any) -> list[ProgramRun]:
    return [
        ProgramRun(p, dataset(), formulation, jax.devices()[:devices], of.sweep.eval_every, **more)
        for p in plan.programs(of)
    ]


SMALL_RESNET: dict[str, Any] = dict(
    model="resnet", width=2, depth=1, warm_start_epochs=(0, 1), tuning_epochs=2, equal_updates=False
)
# Packed forms: changes to the config, and (block, group).
PACKED: dict[str, tuple[dict[str, Any], int, int]] = {
    "an MLP": ({}, 8, 1),
    "a ResNet, each trial's own convolutions": (SMALL_RESNET, 4, 1),
    "a ResNet, block-diagonal": (SMALL_RESNET, 4, 2),
}


def table(of: trial.Study, runs: Sequence[ProgramRun]) -> pd.DataFrame:
    found = pd.DataFrame(
        [row for run in runs for row in rows.rows(of, run.plan, run.records)], columns=rows.columns(of)
    )
    return found.sort_values(["trial", "stage", "step"], ignore_index=True)


def trained(
    of: trial.Study, kernels: str = "mapped", slots: int = 4, devices: int = 1, block: int = 1, group: int = 1
) -> pd.DataFrame:
    """The results table of a study under one formulation."""
    runs = programs(of, Formulation(kernels, block, group, slots), devices)
    for run in runs:
        while run.step():
            pass
    return table(of, runs)


def same(a: pd.DataFrame, b: pd.DataFrame, ignore: Sequence[str] = ("trial",)) -> None:
    """Assert equality to the last bit, but for the columns `ignore`."""
    keys = ["arm", "seed", "stage", "step"]
    a, b = (t.drop(columns=list(ignore)).sort_values(keys, ignore_index=True) for t in (a, b))
    pd.testing.assert_frame_equal(a, b, check_exact=True)


def labelled(sweep: Sweep, fresh: dict[str, Any]) -> trial.Study:
    """The study of a sweep with sizes from the data set's labels, as in a run."""
    return trial.study(sweep, {"noise": SPEC}, fresh, {"noise": dataset().train_labels})


def setting(of: trial.Study) -> settings.Setting:
    """What the statistics need to know of a study."""
    arms = tuple({"arm": arm.arm, **arm.values} for arm in of.arms)
    fresh = {arm.arm: arm.fresh for arm in of.arms}
    return settings.Setting(of.swept, arms, fresh, of.sweep.metric_epochs, of.sweep.equal_updates, of.sweep.eval_every)


def joined(studies: Sequence[trial.Study]) -> trial.Study:
    """Several studies as one, each arm's name with its study's number before it."""
    arms, trials = [], []
    swept = tuple(name for name in FIELDS if any(name in s.swept for s in studies))
    for k, one in enumerate(studies):
        for arm in one.arms:
            values = {name: arm.values.get(name) for name in swept}
            arms.append(dataclasses.replace(arm, arm=f"{k}: {arm.arm}", values=values, fresh=f"{k}: {arm.fresh}"))
        trials += [dataclasses.replace(t, trial=len(trials) + i, arm=f"{k}: {t.arm}") for i, t in enumerate(one.trials)]
    return trial.Study(studies[0].sweep, swept, tuple(arms), tuple(trials))


def of_seed(of: trial.Study, seed: int) -> trial.Study:
    """The trials of one seed alone."""
    return dataclasses.replace(of, trials=tuple(t for t in of.trials if t.seed == seed))


def stage(**changes: Any) -> Stage:
    """The dynamic values of an ordinary stage on all of `SPEC`'s examples."""
    values: dict[str, Any] = dict(
        seed=np.uint32(0), stream=np.int32(0), size=np.int32(50), steps=np.int32(10), learning_rate=np.float32(0.1),
        schedule=np.int32(0), accuracy=np.float32(0), restart_batch_stats=np.bool_(False),
        reset_optimizer=np.bool_(False), redrawn=np.zeros(6, bool), prefix=np.int32(1), gamma=np.float32(-1),
    )  # fmt: skip
    return Stage(**values | changes)


def sample(labels: np.ndarray | None = None) -> Sample:
    """All of `SPEC`'s examples in order."""
    numbers = np.arange(50, dtype=np.int32)
    return Sample(numbers, dataset().train_labels if labels is None else labels, numbers, np.zeros(0, np.int32))


def one_step(one: Core, state: State, **changes: Any) -> State:
    """The state after one step on the first examples."""
    sums = Sums(jnp.zeros((), one.dtype), jnp.int32(0), jnp.int32(0))
    local = jnp.arange(one.point.batch_size, dtype=jnp.int32)
    step = jax.jit(lambda state, stage, sample, data: one.step(state, sums, stage, sample, local, data)[0])
    return step(state, stage(**changes), sample(), resident(dataset()))


def of_model(of: trial.Study, model: str) -> trial.Study:
    """The study with another network in each of its trials: one that no config field names."""
    trials = tuple(dataclasses.replace(t, point=t.point.replace(model=model)) for t in of.trials)
    return dataclasses.replace(of, trials=trials)

"""Stages before tuning: nested data sets, resets, chunks, ends by accuracy (the paper's figures 4, 6 and 11)."""

import itertools
from fractions import Fraction

import jax
import numpy as np
import pytest
import tiny
from scipy import stats

from plastic_jax.data import sampler
from plastic_jax.errors import InputError
from plastic_jax.results import rows, summaries, tables
from plastic_jax.study.config import Config, Sweep, canonical
from plastic_jax.train.trial_axis import Formulation

STAGED = dict(stage_accuracy=0.6, accuracy_ends="pretraining", warm_start_epochs=12, equal_updates=False)

FRESH_STAGES = {"pretraining_stages": 0}


# The construction, against the definition in figure 4, right.


def defined(labels, groups, uniform):
    """D_1 .. D_{n+1} as sets, from C_1 .. C_{n+1} (sets of classes) and D_{u,1} .. D_{u,n+1}, word by word."""
    d_c = set(range(len(labels))) - set().union(*uniform)
    found, before = [], set()
    for c_i, d_u_i in zip(groups, uniform, strict=True):
        before = before | d_u_i | {x for x in d_c if labels[x] in c_i}
        found.append(before)
    return found


@pytest.mark.parametrize("size", [41, 60])
@pytest.mark.parametrize("n", [1, 2, 3, 6])
@pytest.mark.parametrize("r", [0.0, 0.3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_nested_stages_are_the_papers(size, n, r, noise):
    pool, classes = 80, 7
    uneven = np.random.default_rng(n).choice(classes, pool, p=np.arange(1, 8) / 28).astype(np.int32)
    drawn = sampler.train_set(
        5, uneven, classes, train_examples=size, validation_fraction=0.0, label_noise=noise, nesting=(n, r)
    )
    assert sorted(drawn.permutation) == list(range(size))
    if noise:
        assert (drawn.labels != uneven[drawn.ids]).any()
    sizes = [0, *drawn.sizes.tolist()]
    assert len(sizes) == n + 2 and sizes[-1] == size
    parts = [set(drawn.permutation[a:b].tolist()) for a, b in itertools.pairwise(sizes)]
    # D_u and the C_i are the random part: D_u is what came first in the seed's own order.
    plain = sampler.train_set(5, uneven, classes, train_examples=size, validation_fraction=0.0, label_noise=noise)
    wanted = int(Fraction(r).limit_denominator(100) * size + Fraction(1, 2))
    d_u = set(plain.permutation[:wanted].tolist())
    uniform = [part & d_u for part in parts]
    assert max(map(len, uniform)) - min(map(len, uniform)) <= 1 and sum(map(len, uniform)) == wanted
    members = [{int(drawn.labels[x]) for x in part - d_u} for part in parts]
    for i, group in enumerate(members):
        assert all(group.isdisjoint(other) for other in members[:i]), "a class comes with one stage alone"
    groups = _completed(members, classes)
    cumulated = [set().union(*parts[: i + 1]) for i in range(n + 1)]
    assert cumulated == defined(drawn.labels.tolist(), groups, uniform)
    assert {c for group in groups for c in group} == set(range(classes))
    if r == 1:
        assert drawn.permutation.tolist() == plain.permutation.tolist()
        assert tuple(drawn.sizes) == sampler.nested_sizes(size, classes, n, r)


def _completed(members, classes):
    """C_1 .. C_{n+1}: the classes seen, and those without an example outside D_u put where there is room."""
    groups = [set(group) for group in members]
    for c in set(range(classes)) - set().union(*groups):
        min(groups, key=len).add(c)
    assert max(map(len, groups)) - min(map(len, groups)) <= 1, "classes are dealt as evenly as can be"
    return groups


def test_classes_are_dealt_at_random_by_the_seed_alone():
    """Over seeds, each class is as often in C_1; with one seed, noise and size leave the C_i as they are."""
    labels = np.repeat(np.arange(5), 20).astype(np.int32)

    def first(seed, **changes):
        given = dict(train_examples=0, validation_fraction=0.0, label_noise=0.0, nesting=(4, 0.0))
        drawn = sampler.train_set(seed, labels, 5, **(given | changes))
        (c,) = set(drawn.labels[drawn.permutation[: drawn.sizes[0]]].tolist())
        return c

    counts = np.bincount([first(seed) for seed in range(200)], minlength=5)
    assert stats.chisquare(counts).pvalue > 1e-3
    assert all(first(s) == first(s, label_noise=0.3, train_examples=70) for s in range(10))


def test_estimated_sizes_are_exact_for_classes_of_one_size():
    labels = np.repeat(np.arange(6), 10).astype(np.int32)
    for n in (1, 2, 5):
        drawn = sampler.train_set(
            1, labels, 6, train_examples=0, validation_fraction=0.0, label_noise=0.0, nesting=(n, 0.0)
        )
        assert tuple(drawn.sizes) == sampler.nested_sizes(60, 6, n, 0.0)


def test_the_study_takes_its_sizes_from_the_seeds_labels():
    fields = dict(pretraining_stages=(1, 2), uniform_fraction=(1.0, 0.0), batch_size=4, equal_updates=False)
    sweep = Sweep.of({**tiny.CONFIG, **fields, "warm_start_epochs": 2})
    assert tiny.study(FRESH_STAGES, **fields, warm_start_epochs=2).estimated
    study = tiny.labelled(sweep, FRESH_STAGES)
    assert not study.estimated
    for trial in study.trials:
        n, r = trial.point.nesting
        sizes = [stage.size for stage in trial.stages]
        if trial.point.course == "fresh":
            assert sizes == [50]
        elif r == 1:
            assert sizes == {1: [25, 50], 2: [17, 34, 50]}[trial.point.pretraining_stages]
        else:
            drawn = sampler.train_set(
                trial.seed, tiny.dataset().train_labels, 5,
                train_examples=0, validation_fraction=0.0, label_noise=0.0, nesting=(n, r),
            )  # fmt: skip
            assert sizes == list(drawn.sizes)


# Stages by name, stream and length.


def stage_list(**changes):
    study = tiny.study(FRESH_STAGES, **{**STAGED, **changes})
    return study.trials[-1].stages


def test_stages_have_their_names_streams_and_lengths():
    three = stage_list(pretraining_stages=3)
    assert [(s.name, s.stream, s.size, s.epochs, s.accuracy) for s in three] == [
        ("pretraining_1", 1, 13, 12, 0.6),
        ("pretraining_2", 2, 26, 12, 0.6),
        ("pretraining_3", 3, 38, 12, 0.6),
        ("tuning", 0, 50, 4, 0.0),
    ]
    assert [s.name for s in stage_list(pretraining_stages=1)] == ["pretraining", "tuning"]
    assert [s.name for s in stage_list()] == ["pretraining", "tuning"]
    capped = stage_list(pretraining_stages=2, max_stage_epochs=3)
    assert [s.epochs for s in capped] == [3, 3, 4]
    both = stage_list(pretraining_stages=2, max_stage_epochs=3, accuracy_ends="all")
    assert [(s.epochs, s.accuracy) for s in both] == [(3, 0.6)] * 3
    twelve = tiny.study(FRESH_STAGES, pretraining_stages=12, batch_size=2, warm_start_epochs=1).trials[-1].stages
    assert [s.name for s in twelve][:2] + [s.name for s in twelve][-2:] == [
        "pretraining_01", "pretraining_02", "pretraining_12", "tuning",
    ]  # fmt: skip


def test_chunks_arrive_and_the_last_may_be_smaller():
    study = tiny.study({"intervention": "reinitialise"}, chunk_examples=15, intervention="none", equal_updates=False)
    fresh, warm = study.trials[0].stages, study.trials[-1].stages
    assert [(s.name, s.stream, s.size, s.epochs) for s in warm] == [
        ("chunk_1", 1, 15, 4), ("chunk_2", 2, 30, 4), ("chunk_3", 3, 45, 4), ("tuning", 0, 50, 4),
    ]  # fmt: skip
    assert [s.redrawn for s in warm] == [()] * 4 and [s.redrawn for s in fresh] == [(), *[(1, 2, 3)] * 3]
    assert [s.restart_batch_stats for s in fresh] == [True] * 4 and [s.reset_optimizer for s in fresh] == [True] * 4
    assert [s.restart_batch_stats for s in warm] == [True, False, False, False]
    assert [a.values["intervention"] for a in study.arms] == ["reinitialise", "none"]
    (whole,) = tiny.study({}, chunk_examples=50, warm_start_epochs=0, seeds=1).trials
    assert [(s.name, s.size) for s in whole.stages] == [("tuning", 50)]


# Fields without effect.


def test_fields_without_effect_are_null():
    def own(**changes):
        return canonical(Config(**changes))

    fresh = [own(warm_start_epochs=0), own(pretraining_stages=0), own(pretraining_stages=0, reset="1", seeds=3)]
    fresh += [own(warm_start_epochs=0, uniform_fraction=0.5, stage_accuracy=0.9, accuracy_ends="pretraining")]
    assert all(other == fresh[0] for other in fresh)
    assert fresh[0]["warm_start_epochs"] == fresh[0]["pretraining_stages"] == 0 and fresh[0]["reset"] is None
    assert own()["pretraining_fraction"] == 0.5
    assert own(pretraining_stages=2)["pretraining_fraction"] is None
    assert own(uniform_fraction=0.5)["pretraining_fraction"] is None
    assert own(reset="1", intervention="reinitialise")["reset"] is None
    online = own(chunk_examples=9, pretraining_fraction=0.3, warm_start_epochs=4, tuning_learning_rate_factor=3.0)
    assert online == own(chunk_examples=9)
    smooth = own(transition="smooth", pretraining_stages=4, reset="1", uniform_fraction=0.1)
    assert smooth == own(transition="smooth") and smooth["warm_start_epochs"] is None


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("uniform_fraction", 1.1, "from 0 to 1"),
        ("uniform_fraction", -0.1, "from 0 to 1"),
        ("gamma", 1.5, "from 0 to 1"),
        ("gamma", -0.5, "from 0 to 1"),
        ("pretraining_stages", -1, "at least 0"),
        ("chunk_examples", -1, "at least 0"),
        ("intervention", "shrink", "none, reinitialise"),
        ("accuracy_ends", "tuning", "all, pretraining"),
    ],
)
def test_a_bad_value_is_refused(field, value, words):
    with pytest.raises(InputError, match=words):
        Sweep.of({field: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(pretraining_stages=5, uniform_fraction=0.5, batch_size=1), ["pretraining_stages=5", "C_6", "5 classes"]),
        (dict(pretraining_stages=7), ["pretraining_1", "batch_size=8", "pretraining_stages=7", "uniform_fraction=1"]),
        (dict(reset="4"), ["reset=4", "1 to 3"]),
        (dict(chunk_examples=51), ["chunk_examples=51", "50"]),
        (dict(chunk_examples=5), ["batch_size=8", "chunk_1", "chunk_examples=5"]),
        (dict(chunk_examples=10, transition="smooth"), ["chunk_examples=10", "smooth"]),
        (dict(pretraining_stages=200, batch_size=1), ["pretraining_stages=200", "200"]),
    ],
)
def test_fields_impossible_together_are_refused(changes, words):
    with pytest.raises(InputError) as error:
        tiny.study(**changes)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_more_stages_than_classes_are_fine_without_classes():
    assert len(tiny.study(FRESH_STAGES, pretraining_stages=6, batch_size=4).trials[-1].stages) == 7


def test_a_stage_that_labels_make_too_small_is_refused_by_seed():
    """Estimated sizes hold a batch, those of this seed's labels do not."""
    fields = dict(pretraining_stages=4, uniform_fraction=0.0, batch_size=10, warm_start_epochs=2, seeds=20)
    assert tiny.study(FRESH_STAGES, **fields).trials
    with pytest.raises(InputError, match="of seed") as error:
        tiny.labelled(Sweep.of({**tiny.CONFIG, **fields}), FRESH_STAGES)
    assert "uniform_fraction=0.0" in str(error.value)


# One program, paired batches, forks and ends by accuracy.


@pytest.fixture(scope="module")
def many():
    """All dynamic fields in one study: numbers of stages, r, resets, rates, interventions, chunks, gamma."""
    fresh = {"warm_start_epochs": 0}
    common = dict(batch_size=4, equal_updates=False, seeds=2, width=6, tuning_epochs=5)
    sweeps = [
        dict(pretraining_stages=(1, 2), uniform_fraction=(1.0, 0.4), **{**STAGED, "warm_start_epochs": (0, 6)}),
        dict(warm_start_epochs=(0, 3), reset=("none", "1", "2-3"), tuning_learning_rate_factor=(1.0, 10.0)),
        dict(warm_start_epochs=3, reset_optimizer=False, batch_stats=("carry", "restart"), reset=("2", "1-3")),
        dict(chunk_examples=(0, 20, 33), intervention=("none", "reinitialise"), warm_start_epochs=2),
        dict(transition="smooth", gamma=(0.0, 0.2, 0.8), pretraining_fraction=(0.3, 0.6)),
    ]
    studies = [tiny.labelled(Sweep.of({**tiny.CONFIG, **common, **s}), fresh) for s in sweeps]
    return tiny.joined(studies)


def test_no_value_of_a_dynamic_field_makes_a_further_program(many):
    (run,) = tiny.programs(many, Formulation("mapped", slots=4))
    compilations = []

    def heard(event: str, _: float, **more: str) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(more.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(heard)
    stages_side_by_side = set()
    while run.step():
        stages_side_by_side.add(frozenset(run.nodes[s.node].stage.name for s in run.slots if s.node is not None))
    ours = [name for name in compilations if name in {"jit(chunk)", "jit(start)", "jit(place)", "jit(fit)"}]
    assert sorted(ours) == ["jit(chunk)", "jit(fit)", "jit(place)", "jit(start)"]
    assert max(map(len, stages_side_by_side)) > 2, "trials of one batch should be in different stages"


def test_trials_in_other_stages_change_nothing(many):
    """Every trial of the joined study, bit for bit as in a study of its own seed with other slots."""
    whole = tiny.trained(many, slots=4)
    for seed in (0, 1):
        alone = tiny.trained(tiny.of_seed(many, seed), slots=1)
        tiny.same(whole[whole.seed == seed], alone)
    assert whole[whole.accuracy_reached.notna()].groupby("accuracy_reached").size().gt(0).sum() == 2


def test_the_tuning_order_is_the_same_for_all_arms_of_a_seed(many):
    (run,) = tiny.programs(many, Formulation("mapped", slots=4))
    orders = {0: set(), 1: set()}
    while True:
        run._deal()
        state = jax.device_get(run._state)
        for i, slot in enumerate(run.slots):
            if slot.node is not None and slot.epoch == 0 and run.nodes[slot.node].stage.name == "tuning":
                orders[run.nodes[slot.node].trial.seed].add(tuple(state.order[i].tolist()))
        if not run.step():
            break
    assert [len(found) for found in orders.values()] == [1, 1] and orders[0] != orders[1]


def test_the_cap_ends_a_stage_that_never_reaches_its_accuracy():
    study = tiny.study(
        FRESH_STAGES, pretraining_stages=2, stage_accuracy=1.0, accuracy_ends="pretraining", warm_start_epochs=9,
        max_stage_epochs=3, learning_rate=1e-6, equal_updates=False,
    )  # fmt: skip
    found = tiny.trained(study)
    before = found[found.stage.str.startswith("pretraining")]
    ends = before.groupby(["trial", "stage"]).tail(1)
    assert np.floor(ends.epoch).eq(3).all() and ends.accuracy_reached.eq(False).all() and len(ends) == 4
    others = found.drop(index=ends.index)
    assert others.accuracy_reached.isna().all(), "null within a stage, and where no accuracy was asked for"
    assert found[found.stage == "tuning"].groupby("trial").size().eq(4).all()
    summary = summaries.summary(found, tiny.setting(study))
    assert [row["unreached"] for row in summary] == [0, 2]


def test_the_table_without_ends_by_accuracy_has_no_such_column(tmp_path):
    study = tiny.study(seeds=1)
    assert "accuracy_reached" not in rows.columns(study)
    asked = tiny.study(FRESH_STAGES, **STAGED, seeds=1)
    found = tiny.trained(asked)
    tables.write(found, tmp_path / "results.parquet", asked.swept)
    read = tables.read(tmp_path / "results.parquet")
    assert read.accuracy_reached.isna().tolist() == found.accuracy_reached.isna().tolist()
    assert read.accuracy_reached.dropna().tolist() == found.accuracy_reached.dropna().tolist() != []


def test_the_control_of_many_stages_learns_its_length():
    """Pretraining ends by accuracy, tuning does not: the fresh trial goes on to the longest arm's updates."""
    study = tiny.study(
        FRESH_STAGES, **{**STAGED, "equal_updates": True}, pretraining_stages=(1, 3), seeds=3, tuning_epochs=6
    )
    found = tiny.trained(study)
    for _, own in found.groupby("seed"):
        most = own[own.pretraining_stages > 0].step.max()
        fresh = own[own.pretraining_stages == 0]
        assert np.floor(fresh.epoch.max()) == max(most * 8 // 50, 6)
        assert set(fresh.stage) == {"tuning", "tuning_continued"}
    controls = [row["pairs_equal_updates"] for row in summaries.summary(found, tiny.setting(study))]
    assert controls == [0, 3, 3]
    tiny.same(found, tiny.trained(study, slots=1))

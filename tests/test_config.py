"""Bad input is refused in one sentence that names the field, the value and what is allowed."""

import numpy as np
import pytest
import tiny

from plastic_jax.errors import InputError
from plastic_jax.study.config import FIELDS, Sweep, canonical


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("wdth", 8, "did you mean width"),
        ("seeds", 0, "at least 1"),
        ("seeds", (1, 2), "one value for the whole run"),
        ("width", 0, "at least 1"),
        ("width", 8.5, "a whole number"),
        ("width", "a", "a whole number"),
        ("width", True, "a whole number"),
        ("width", (8, 8), "twice"),
        ("width", (), "at least one value"),
        ("warm_start_epochs", -1, "at least 0"),
        ("tuning_epochs", -5, "at least 1"),
        ("label_noise", 1.5, "from 0 to 1"),
        ("label_noise", -0.1, "from 0 to 1"),
        ("label_noise", float("nan"), "from 0 to 1"),
        ("model", "cnn", "one of mlp, resnet"),
        ("optimizer", "adamw", "one of adam"),
        ("learning_rate", 0.0, "above 0"),
        ("learning_rate", float("inf"), "above 0"),
        ("equal_updates", "maybe", "True or False"),
        ("batch_size", 2**40, "a whole number"),
        ("pretraining_fraction", 0.0, "above 0 to 1"),
        ("keep", "all", "none, ends, stages"),
        ("warm_start_epochs", np.array([1, 2.5]), "a whole number"),
    ],
)
def test_a_bad_value_is_refused_by_name(field, value, words):
    with pytest.raises(InputError) as error:
        Sweep.of({field: value})
    assert field in str(error.value) and words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(batch_size=26), "batch_size=26"),
        (dict(metric_epochs=5), "metric_epochs=5"),
        (dict(train_examples=51), "noise has 50"),
        (dict(train_examples=40, validation_fraction=0.5), "25 are left"),
        (dict(schedule="cosine"), "equal_updates=False"),
        (dict(tuning_epochs=2**30), "too long"),
        (dict(first_seed=2**31 - 2), "seeds=2"),
        (dict(compute_dtype=("float32", "float64")), "float64 must be a run's only type"),
        (dict(stage_accuracy=0.9, max_stage_epochs=1), "metric_epochs=2"),
        (dict(seeds=3_000_000), "at most 100000"),
    ],
)
def test_fields_impossible_together_are_refused(changes, words):
    with pytest.raises(InputError, match="config") as error:
        tiny.study(**changes)
    assert words in str(error.value)


def test_a_batch_may_be_as_large_as_the_subset():
    assert tiny.study(batch_size=25).trials


def test_sweeps_are_the_product_of_their_values():
    sweep = Sweep.of({"width": (8, 16), "optimizer": "adam,sgd", "seeds": 3})
    assert sorted((p.width, p.optimizer) for p in sweep.points()) == [
        (8, "adam"), (8, "sgd"), (16, "adam"), (16, "sgd"),
    ]  # fmt: skip
    assert sweep.seeds == 3


def test_whole_numbers_are_taken_for_real_fields_and_words_for_booleans():
    sweep = Sweep.of({"learning_rate": 1, "equal_updates": "False"})
    assert sweep.values["learning_rate"] == (1.0,) and sweep.equal_updates is False


@pytest.mark.parametrize("given", [range(0, 3), np.arange(3), [np.int64(0), 1, 2]])
def test_sequences_of_python_and_numpy_are_taken(given):
    assert Sweep.of({"warm_start_epochs": given}).values["warm_start_epochs"] == (0, 1, 2)


def test_every_field_is_documented():
    for name, spec in FIELDS.items():
        assert spec.doc, name


def test_fields_without_effect_are_null():
    (point,) = Sweep.of({"warm_start_epochs": 0}).points()
    values = canonical(point)
    assert [values[n] for n in ("pretraining_fraction", "batch_stats", "reset_optimizer")] == [None] * 3
    assert values["tuning_learning_rate_factor"] == 1.0
    (stateless,) = Sweep.of({"optimizer": "sgd"}).points()
    assert canonical(stateless)["reset_optimizer"] is None

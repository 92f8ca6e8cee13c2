"""From what the nodes recorded to the results table: a shared prefix's rows stand under each of its trials."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from plastic_jax.fields import Column
from plastic_jax.methods.diagnostics import DIAGNOSTICS
from plastic_jax.results.settings import Setting
from plastic_jax.study.config import diagnostics_named
from plastic_jax.study.plan import Node, ProgramPlan
from plastic_jax.study.trial import Study
from plastic_jax.train.schedule import Records

METRICS = ("train_accuracy", "train_loss", "test_accuracy", "test_loss")
VALIDATION = ("validation_accuracy", "validation_loss")


def columns(study: Study) -> list[str]:
    """The table's columns in order; some only where examples were held back, or stages end by accuracy."""
    held = VALIDATION if any(study.sweep.values["validation_fraction"]) else ()
    reached = ("accuracy_reached",) if any(study.sweep.values["stage_accuracy"]) else ()
    head = ["trial", "arm", "seed", *study.swept, "stage", "epoch", "step", "examples_seen"]
    return [*head, *METRICS, *held, "fit_accuracy", *reached, "diverged", *(c.name for c in diagnostics(study))]


def diagnostics(study: Study) -> tuple[Column, ...]:
    """What is measured in addition to accuracy and loss."""
    return tuple(c for name in diagnostics_named(study.sweep.diagnostics) for c in DIAGNOSTICS[name].columns)


def setting(study: Study) -> Setting:
    """What the statistics need to know about a study."""
    return Setting(
        swept=study.swept,
        arms=tuple({"arm": arm.arm, **arm.values} for arm in study.arms),
        fresh={arm.arm: arm.fresh for arm in study.arms},
        metric_epochs=study.sweep.metric_epochs,
        equal_updates=study.sweep.equal_updates,
        eval_every=study.sweep.eval_every,
        diagnostics=diagnostics(study),
    )


def rows(study: Study, program: ProgramPlan, records: Records, only: Iterable[int] | None = None) -> Iterator[dict]:
    """The table's rows of a program's nodes, or of the latest record of each of the nodes `only`.

    A trial shows its own evaluations alone: those of its `eval_every` and its stages' ends, not the places where
    other trials part from it.
    """
    values, names = {arm.arm: arm.values for arm in study.arms}, [c.name for c in diagnostics(study)]
    trials = {trial.trial: trial for trial in program.trials}
    for index in range(len(program.nodes)) if only is None else only:
        node = program.nodes[index]
        found = records.get(index, [])
        for record in found if only is None else found[-1:]:
            for number in node.trials:
                if not _own(node, record, number, study.sweep.eval_every):
                    continue
                trial = trials[number]
                yield {
                    "trial": number,
                    "arm": trial.arm,
                    "seed": trial.seed,
                    **values[trial.arm],
                    **_row(node, record, number, names),
                }


def _own(node: Node, record: dict[str, Any], trial: int, eval_every: int) -> bool:
    if record["diverged"] or record["done"] or node.closely or record["epoch"] % eval_every == 0:
        return True
    return record["last"] and trial in node.ends


def _row(node: Node, record: dict[str, Any], trial: int, diagnostics: Sequence[str]) -> dict[str, Any]:
    batch, stage = node.trial.point.batch_size, node.stage
    diverged = record["diverged"]
    ends = record["done"] or (record["last"] and trial in node.ends)
    measured = {name: record.get(name) for name in (*METRICS, *VALIDATION, *diagnostics) if name in record}
    return {
        "stage": stage.name,
        "epoch": record["step"] * batch / stage.size,
        "step": record["total"],
        "examples_seen": record["total"] * batch,
        **{name: None if diverged else value for name, value in measured.items()},
        "fit_accuracy": record["fit_accuracy"] if ends and not diverged else None,
        "accuracy_reached": record["done"] if ends and not diverged and stage.accuracy else None,
        "diverged": diverged,
    }

"""The results table, `results.parquet`: one row per trial, stage and evaluation."""

import io
import os
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from plastic_jax.errors import InputError
from plastic_jax.files import replace_file
from plastic_jax.results.settings import plain

_HEAD = {"trial": pa.int32(), "arm": pa.string(), "seed": pa.int32()}


_TAIL = {
    "stage": pa.string(),
    "epoch": pa.float64(),
    "step": pa.int64(),
    "examples_seen": pa.int64(),
    "train_accuracy": pa.float64(),
    "train_loss": pa.float64(),
    "test_accuracy": pa.float64(),
    "test_loss": pa.float64(),
    "validation_accuracy": pa.float64(),
    "validation_loss": pa.float64(),
    "fit_accuracy": pa.float64(),
    "accuracy_reached": pa.bool_(),
    "diverged": pa.bool_(),
}


_OPTIONAL = frozenset({"validation_accuracy", "validation_loss", "accuracy_reached"})


_NULLABLE = frozenset(name for name, kind in _TAIL.items() if kind == pa.float64()) - {"epoch"} | {"accuracy_reached"}


def write(
    table: pd.DataFrame, path: str | os.PathLike[str], swept: Sequence[str], diagnostics: Sequence[str] = ()
) -> None:
    """Write the results table so that equal tables give equal bytes, in whatever order they come.

    `table`: one row per (trial, stage, step), columns as in `results.parquet` (those of validation
    and `accuracy_reached` may be missing); `swept` names the swept columns, of integers, floats, strings or bools
    with None, NaN or pandas.NA where a field has no effect; `diagnostics` names further columns of real numbers.
    Integers with gaps should come as dtype
    Int64 or object: pandas has already made floats of them otherwise. Metrics that are not finite
    become null. Raises ValueError where a column is missing, unknown or of mixed types, or where
    two rows are of one evaluation.
    """
    kinds = {**_HEAD, **_TAIL, **dict.fromkeys(diagnostics, pa.float64())}
    names = [*_HEAD, *swept, *(c for c in _TAIL if c in table.columns or c not in _OPTIONAL), *diagnostics]
    if missing := [name for name in names if name not in table.columns]:
        raise ValueError(f"the results table lacks the columns {missing}")
    if unknown := [name for name in table.columns if name not in names]:
        raise ValueError(f"the results table has unknown columns {unknown}; swept are {[*swept]}")
    table = table[names].sort_values(["trial", "stage", "step"], kind="stable")
    if table.duplicated(["trial", "stage", "step"]).any():
        raise ValueError("the results table has two rows of one trial, stage and step")
    nullable = {*_NULLABLE, *swept, *diagnostics}
    arrays = [_array(table[name], kinds.get(name), name, name in nullable) for name in names]
    fields = [pa.field(name, array.type, nullable=name in nullable) for name, array in zip(names, arrays, strict=True)]
    buffer = io.BytesIO()
    pq.write_table(
        pa.Table.from_arrays(arrays, schema=pa.schema(fields)),
        buffer,
        row_group_size=max(len(table), 1),
        compression="zstd",
    )
    replace_file(path, buffer.getvalue())


def _array(column: pd.Series, kind: pa.DataType | None, name: str, nullable: bool) -> pa.Array:
    """One column as an Arrow array; `kind` None: a swept column, typed by its values."""
    null = column.isna().to_numpy()
    if kind is None:
        values = [None if gap else plain(v) for v, gap in zip(column.tolist(), null, strict=True)]
        kind = _swept_type(column, {type(value) for value in values if value is not None})
        return pa.array(values, type=kind)
    if null.any() and not nullable:
        raise ValueError(f"the results table has nulls in the column {name!r}")
    if kind == pa.float64():
        numbers = column.to_numpy(dtype=np.float64, na_value=np.nan)
        return pa.array(numbers, mask=~np.isfinite(numbers))
    return pa.array(column.tolist(), type=kind, mask=null)


def _swept_type(column: pd.Series, kinds: set[type]) -> pa.DataType:
    if not kinds:  # nothing but nulls: the dtype, where it says anything
        letter = getattr(column.dtype, "kind", "O")
        return {"i": pa.int64(), "f": pa.float64(), "b": pa.bool_()}.get(letter, pa.string())
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return pa.int64()
    if kinds <= {int, float}:
        return pa.float64()
    if kinds == {str}:
        return pa.string()
    raise ValueError(
        f"the swept column {column.name!r} holds {sorted(kind.__name__ for kind in kinds)}; "
        "allowed are integers, floats, strings or bools"
    )


def read(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read `results.parquet`; raises InputError where there is none or it cannot be read.

    Null metrics are NaN. Swept integers and bools come as the nullable dtypes Int64 and boolean.
    """
    try:
        # ParquetFile, because read_table would take a folder named a=b for a partition
        with pq.ParquetFile(path) as file:
            table = file.read()
    except FileNotFoundError:
        raise InputError(f"there is no results table {os.fspath(path)!r}") from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise InputError(f"{os.fspath(path)!r} is no readable results table: {reason}") from error
    missing = [name for name in [*_HEAD, *_TAIL] if name not in table.column_names and name not in _OPTIONAL]
    if needed := [name for name in missing if name not in _NULLABLE]:
        raise InputError(f"{os.fspath(path)!r} is no results table: it lacks {', '.join(needed)}")
    for name in missing:  # new since it was written
        table = table.append_column(name, pa.nulls(len(table), _TAIL[name]))
    nullable = {pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}
    frame = table.to_pandas(types_mapper=nullable.get)
    return frame.astype({"step": "int64", "examples_seen": "int64", "diverged": "bool"})

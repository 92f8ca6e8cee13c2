"""The throughput benchmark's table, markdown and figure."""

from pathlib import Path
from typing import Any

HEADS = ("row", "trials", "images/s", "x one at a time", "x best PyTorch", "x obvious", "of matmul", "of memory")


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _cells(row: dict[str, Any]) -> list[str]:
    low, high = (row["ms_per_trial_step"] / ms * row["images_per_second"] for ms in reversed(row["spread_ms"]))
    note = f" ({row['note']})" if row["note"] else ""
    return [
        row["row"] + note,
        str(row["trials"]),
        f"{row['images_per_second']:,.0f} [{low:,.0f}, {high:,.0f}]",
        _ratio(row["over_one_at_a_time"]),
        _ratio(row["over_best_pytorch"]),
        _ratio(row["over_obvious"]),
        f"{100 * row['of_matmul_rate']:.0f} %",
        f"{100 * row['of_memory_rate']:.0f} %",
        f"{row['compile_seconds']:.0f} s",
        f"{row['peak_bytes'] / 2**20:,.0f} MiB" if row["peak_bytes"] else "-",
    ]


def markdown(found: dict[str, Any]) -> str:
    """One network's rows as a table, fastest first, and the yardsticks."""
    heads = [*HEADS, "ready after", "memory"]
    rows = sorted(found["rows"], key=lambda row: -row["images_per_second"])
    lines = [heads, ["---"] * len(heads), *(_cells(row) for row in rows)]
    rates = found["rates"]
    after = (
        f"\n{found['device']}. Matmul rate {rates['matmul_flops'] / 1e9:,.0f} GFLOP/s, copy rate "
        f"{rates['copy_bytes'] / 1e9:,.1f} GB/s; a step has {found['step_flops'] / 1e9:.3g} GFLOP "
        f"({found['padded_step_flops'] / 1e9:.3g} with padding, which utilisation is counted by), XLA counts "
        f"{found['compiled_flops_over_closed_form']:.3f} of the closed form's."
    )
    if found["evaluation_over_forward_share"] is not None:
        share = found["evaluation_over_forward_share"]
        after += f" An evaluation takes {share:.2f} times its forward FLOPs' share of a step."
    left = f" Left out: {'; '.join(found['left_out'])}." if found["left_out"] else ""
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n" + after + left + "\n"


def figure(results: list[dict[str, Any]], growth: dict[str, Any] | None) -> Any:
    """Bars of images/s of each row for each network, and the growth curves below."""
    from matplotlib.figure import Figure

    count = len(results)
    panels = list(growth["curves"]) if growth else []
    grid_rows = count + (2 if panels else 0)
    heights = [max(2.0, 0.3 * len(r["rows"])) for r in results] + [2.4] * (2 if panels else 0)
    drawn = Figure(figsize=(9, sum(heights) + 0.9 * grid_rows), layout="constrained")
    grid = drawn.add_gridspec(grid_rows, 3, height_ratios=heights)
    for k, found in enumerate(results):
        axis = drawn.add_subplot(grid[k, :])
        rows = sorted(found["rows"], key=lambda row: row["images_per_second"])
        names = [f"{row['row']} [{row['trials']}]" for row in rows]
        values = [row["images_per_second"] for row in rows]
        low, high = zip(
            *((v - found["batch_size"] * 1e3 / r["spread_ms"][1], found["batch_size"] * 1e3 / r["spread_ms"][0] - v)
              for v, r in zip(values, rows, strict=True)), strict=True,
        )  # fmt: skip
        colours = ["C0" if row["row"].startswith("ours") else "C1" if "pytorch" in row["row"] else "C7" for row in rows]
        axis.barh(names, values, color=colours, xerr=[low, high], error_kw={"lw": 1})
        axis.set_xscale("log")
        axis.set_title(f"{found['model']}, width {found['width']}, batch {found['batch_size']}", loc="left")
        axis.set_xlabel("images/s over all trials [number of trials]; bars: smallest and largest sample")
    for k, name in enumerate(panels):
        axis = drawn.add_subplot(grid[count + k // 3, k % 3])
        x, y = zip(*growth["curves"][name], strict=True)  # pyright: ignore[reportOptionalSubscript]
        axis.loglog(x, y, "o-")
        what, _, of = name.partition("_of_")
        axis.set_xlabel(of)
        axis.set_ylabel(what)
        exponent = growth["exponents"][name]  # pyright: ignore[reportOptionalSubscript]
        axis.set_title(f"~ {of}^{exponent:.2f}" if exponent is not None else "", fontsize=9)
    return drawn


def write(results: list[dict[str, Any]], growth: dict[str, Any] | None, folder: Path) -> list[Path]:
    """Write throughput.md and throughput.png; throughput.json is the caller's."""
    text = "\n".join(f"### {r['model']}, width {r['width']}, batch {r['batch_size']}\n\n{markdown(r)}" for r in results)
    (folder / "throughput.md").write_text(text)
    drawn = figure(results, growth)
    drawn.savefig(folder / "throughput.png", dpi=130)
    return [folder / "throughput.md", folder / "throughput.png"]

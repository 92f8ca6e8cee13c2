"""The throughput benchmark's table, markdown and figure."""

from pathlib import Path
from typing import Any

HEADS = (
    *("row", "trials", "images/s", "x one at a time", "x best PyTorch", "x obvious", "of matmul", "of memory"),
    *("first step after", "JAX: planned by XLA", "PyTorch: peak"),
)
MEMORY = (
    "Memory: for JAX's rows what XLA plans for the program (data, states, results, temporaries; all devices together), "
    "which shares its process with the other rows; for PyTorch's {peak}. The two are no measure of each other."
)
PEAKS = {"cpu": "the peak of its processes, the interpreter and libraries included", "gpu": "the peak of its allocator"}


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.0f} MiB"


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
        f"{row['first_step_seconds']:.1f} s",
        _mib(row["program_bytes"]),
        _mib(row["process_bytes"]),
    ]


def markdown(found: dict[str, Any]) -> str:
    """One network's rows as a table, fastest first, and the yardsticks."""
    rows = sorted(found["rows"], key=lambda row: -row["images_per_second"])
    lines = [HEADS, ["---"] * len(HEADS), *(_cells(row) for row in rows)]
    dtype, gpu = found["compute_dtype"], found["backend"] == "gpu"

    def rate(name: str, places: int) -> str:
        low, high = found["rates_spread"][name]
        return f"{found['rates'][name] / 1e9:,.{places}f} [{low / 1e9:,.{places}f}, {high / 1e9:,.{places}f}]"

    said = [
        f"{found['device']}; all rows compute in {dtype}"
        + (f", TF32 {'on' if found['tf32'] else 'off'} on both sides." if gpu and dtype == "float32" else "."),
        f"Matmul rate {rate('matmul_flops', 0)} GFLOP/s ({dtype}), "
        f"rate of memory, read and written in place, {rate('copy_bytes', 1)} GB/s.",
        f"A step has {found['step_flops'] / 1e9:.3g} GFLOP, without the taps outside the image; {_check(found)}",
        "Utilisation counts all taps, as is usual: "
        f"{found['padded_step_flops'] / found['batch_size'] / 1e9:.3g} GFLOP an image.",
        "First step after: seconds to compile anew, without a cache on disk, and to take one step"
        + (f", up to {found['compiling']} rows at a time." if found["compiling"] > 1 else "."),
        "Rates are medians [slowest, fastest sample].",
        MEMORY.format(peak=PEAKS.get(found["backend"], PEAKS["gpu"])),
    ]
    if any("pytorch" in row["row"] for row in rows):
        said.append(f"PyTorch {found.get('pytorch')}: {found['pytorch_settings']}.")
    if found["evaluation_over_forward_share"] is not None:
        share = found["evaluation_over_forward_share"]
        said.append(f"An evaluation takes {share:.2f} times its forward FLOPs' share of a step.")
    if found["figure_2_idle_share"] is not None:
        idle = 100 * found["figure_2_idle_share"]
        said.append(f"In the form chosen, {idle:.1f} % of the slots of the paper's figure 2 would stand idle.")
    if found["left_out"]:
        said.append(f"Left out: {'; '.join(found['left_out'])}.")
    if any(left.startswith("pytorch") for left in found["left_out"]):
        said.append("**Not all of PyTorch's ways were measured: ratios to it are to the best of those that were.**")
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + " ".join(said) + "\n"


def _check(found: dict[str, Any]) -> str:
    ratio = found["compiled_flops_over_written"]
    if ratio is None:
        return "the compiler does not count its own."
    return f"the compiled step has {ratio:.3f} of that, since XLA computes cheap operations anew."


def device_hours(found: dict[str, Any], flops: float) -> list[dict[str, Any]]:
    """Hours for so many `flops` at the rate of this network's steps: our fastest row's, and PyTorch's."""
    hours = []
    for way, sort in (("with our core", "ours"), ("with PyTorch", "pytorch")):
        rows = [row for row in found["rows"] if row["row"].startswith(sort)]
        if rows:
            best = min(rows, key=lambda row: row["ms_per_trial_step"])
            rate = found["step_flops"] / (best["ms_per_trial_step"] / 1e3)
            hours.append({"way": way, "row": best["row"], "flops_per_second": rate, "hours": flops / rate / 3600})
    return hours


def headline(results: list[dict[str, Any]], flops: float) -> str:
    """What the paper's figure 2 would take, extrapolated from each ResNet that was measured."""
    lines = []
    for found in results:
        ways = device_hours(found, flops) if found["model"] == "resnet" else []
        costs = "; ".join(
            f"{way['hours']:,.0f} h {way['way']} ({way['row']}, {way['flops_per_second'] / 1e9:,.0f} GFLOP/s)"
            for way in ways
        )
        if costs:
            lines.append(f"- from {found['title']}, on {found['device']}: {costs}")
    if not lines:
        return ""
    return (
        f"### The paper's figure 2, extrapolated\n\nIts {flops / 1e18:.3g} EFLOP (the dry run of "
        "`experiments.warm_start --preset=paper`: w = 64, float32, evaluations included) over the rate at which "
        "another network's training steps were measured; hours of all devices named, together. Only width 64 in "
        "float32 on the device of interest is the paper's own setting; the others are scaled by FLOPs alone.\n\n"
        + "\n".join(lines)
        + "\n"
    )


def growth_text(growth: dict[str, Any]) -> str:
    """The growth curves' slopes in words."""
    slopes = {name.replace("_", " "): e for name, e in growth["exponents"].items() if e is not None}
    said = ", ".join(f"{name} {e:.2f}" for name, e in slopes.items())
    left = f" Left out (no time): {'; '.join(growth['left_out'])}." if growth["left_out"] else ""
    return f"### Growth of {growth['title']}\n\nSlopes of log against log, 1 being linear: {said or '-'}.{left}\n"


def figure(results: list[dict[str, Any]], growth: dict[str, Any] | None) -> Any:
    """Bars of images/s of each row for each network, and the growth curves below."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    results = [found for found in results if found["rows"]]
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
        if max(values) > 20 * min(values):  # else bars from zero tell more
            axis.set_xscale("log")
        axis.set_title(found["title"], loc="left")
        axis.set_xlabel("images/s over all trials [number of trials]; lines: slowest and fastest sample")
    for k, name in enumerate(panels):
        axis = drawn.add_subplot(grid[count + k // 3, k % 3])
        x, y = zip(*growth["curves"][name], strict=True)  # pyright: ignore[reportOptionalSubscript]
        axis.loglog(x, y, "o-")
        axis.set_xticks(x, [f"{value:g}" for value in x])
        axis.xaxis.set_minor_formatter(NullFormatter())
        what, _, of = name.partition("_of_")
        axis.set_xlabel(of)
        axis.set_ylabel("seconds to compile" if what == "compile" else what)
        exponent = growth["exponents"][name]  # pyright: ignore[reportOptionalSubscript]
        axis.set_title(f"~ {of}^{exponent:.2f}" if exponent is not None else "", fontsize=9)
    return drawn


def write(found: dict[str, Any], folder: Path) -> None:
    """Write throughput.md and throughput.png; throughput.json, which holds `found`, is the caller's.

    Args:
      found: `results` of `benchmark.compare`, `growth`, `left_out` (networks for which no time was left) and
        `figure_2_flops`.
      folder: where to.
    """
    results, growth, left_out = found["results"], found["growth"], found["left_out"]
    parts = [f"### {one['title']}\n\n{markdown(one)}" for one in results]
    parts += [growth_text(growth)] if growth else []
    parts += [f"No time was left for: {'; '.join(left_out)}.\n"] if left_out else []
    parts.append(headline(results, found["figure_2_flops"]))
    (folder / "throughput.md").write_text("\n".join(part for part in parts if part))
    if any(one["rows"] for one in results):
        figure(results, growth).savefig(folder / "throughput.png", dpi=130)

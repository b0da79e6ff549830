"""The table of the benchmark on a GPU, and the targets that it is held against."""

from __future__ import annotations

from typing import Any

TARGETS = {"estimate": 0.03, "gib": 24.0, "speed": 0.85, "bandwidth": 0.70}
_GIB = 2**30


def _named(result: dict[str, Any], method: str, share: float = 0.0) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Measured cells of a method, by shape, batch and checkpointing."""
    return {
        (cell["shape"], cell["batch"], cell["checkpointing"]): cell
        for cell in result["cells"]
        if cell["method"] == method and cell["share"] == share and cell["outcome"] == "measured"
    }


def targets(result: dict[str, Any]) -> dict[str, bool | None]:
    """Which targets are met; None where a cell that it needs was not measured."""
    lora, layers = _named(result, "lora"), _named(result, "lisa-layers")
    both = [(layers[key], lora[key]) for key in layers if key in lora]
    met: dict[str, bool | None] = {
        "LISA(2) without embeddings: no more memory than LoRA r=64": _all(
            a["peak"] <= b["peak"] for a, b in both if both
        ),
        "LISA(2) without embeddings: at least its tokens/s": _all(
            a["tokens_per_second"] >= b["tokens_per_second"] for a, b in both if both
        ),
    }
    for method in ("id3", "lift"):
        cells = _named(result, method, 0.01)
        inside = [cell["peak"] <= TARGETS["gib"] * _GIB for key, cell in cells.items() if key[1] == 1 and key[2]]
        met[f"{method} at 1%, 1 x 1024, checkpointing: inside 24 GB"] = _all(inside)
        fast = [
            cell["tokens_per_second"] >= TARGETS["speed"] * lora[key]["tokens_per_second"]
            for key, cell in cells.items()
            if key in lora
        ]
        met[f"{method} at 1%: at least 0.85 of LoRA's tokens/s"] = _all(fast)
    told = [cell for cell in result["cells"] if cell["outcome"] == "measured" and cell["estimate"]]
    near = [abs(cell["peak"] / cell["estimate"]["peak"] - 1.0) <= TARGETS["estimate"] for cell in told]
    met["estimates within 3% of the peak"] = _all(near)
    steps = [row for row in result["step"]["rows"] if row["run"]] if result["step"] else []
    best: dict[float, float] = {}
    for row in steps:
        best[row["share"]] = max(best.get(row["share"], 0.0), row["of_bandwidth_by_sectors"])
    met["compact step: 70% of the bandwidth for its bytes, by sectors"] = _all(
        share >= TARGETS["bandwidth"] for share in best.values()
    )
    return met


def _all(outcomes: Any) -> bool | None:
    known = list(outcomes)
    return all(known) if known else None


def figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """For the first table: the targets."""
    if not result["run"]:
        return [("", "not run", result["reason"])]
    verdicts = {True: "met", False: "MISSED", None: "not measured"}
    return [(target, verdicts[outcome], "") for target, outcome in targets(result).items()]


def section(result: dict[str, Any]) -> list[str]:
    """The tables as Markdown."""
    lines = ["## On a GPU", ""]
    if not result["run"]:
        return [*lines, f"Not run: {result['reason']}.", ""]
    lines += [
        f"{result['device']}, bf16, AdamW (fused), SDPA, random weights. Peak: allocated, of steps that do not select.",
        "",
        "| shape | method | batch | checkpointing | peak, GiB | of the estimate | selecting, GiB | reserved, GiB "
        "| tokens/s | MFU | selection, s | waits |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in result["cells"]:
        share = f" {cell['share']:.1%}" if cell["share"] else ""
        kept = "on" if cell["checkpointing"] else "off"
        head = f"| {cell['shape']} | {cell['method']}{share} | {cell['batch']} x {cell['length']} | {kept} |"
        told = cell.get("estimate")
        if cell["outcome"] == "measured":
            near = f"{cell['peak'] / told['peak']:.3f}" if told else ""
            lines.append(
                f"{head} {_gib(cell['peak'])} | {near} | {_gib(cell['peak_selecting'])} | {_gib(cell['reserved'])} "
                f"| {cell['tokens_per_second']:.0f} | {_number(cell['mfu'])} | {_number(cell['selection'])} "
                f"| {'' if cell['waits'] is None else cell['waits']} |"
            )
        else:
            why = cell["outcome"] + (f", {_gib(told['peak'])} GiB" if told else "")
            lines.append(f"{head} {why} |" + " |" * 7)
    if result["step"]:
        lines += [
            "",
            f"The compact step on one matrix; a copy moves {result['step']['bandwidth'] / 1e9:.0f} GB/s. 48 bytes an "
            "entry, or those of the sectors that it touches.",
            "",
            "| way | selected | entries | microseconds | of the bandwidth | by sectors |",
            "|---|---|---|---|---|---|",
        ]
        for row in result["step"]["rows"]:
            if row["run"]:
                lines.append(
                    f"| {row['way']} | {row['share']:.1%} | {row['entries']:,} | {1e6 * row['seconds']:.1f} "
                    f"| {row['of_bandwidth']:.2f} | {row['of_bandwidth_by_sectors']:.2f} |"
                )
            else:
                lines.append(f"| {row['way']} | {row['share']:.1%} | not run: {row['reason']} | | | |")
    lines += ["", "| target | outcome |", "|---|---|"]
    lines += [f"| {target} | {outcome} |" for target, outcome, _ in figures(result)]
    return [*lines, ""]


def _gib(value: int | None) -> str:
    return "" if value is None else f"{value / _GIB:.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"

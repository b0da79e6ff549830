"""One page from the figures of all parts of the benchmark: a table of what matters, and each part's own tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from apportion.recipes.bench import ddp, entries, gpu_table, memory, overhead, peers, ranks, resume, scale

Figure = tuple[str, str, str]
"""What, how much, and the formula or bar that it is held against."""

SECTIONS: Mapping[str, Callable[[dict[str, Any]], list[str]]] = {
    "peers": peers.section,
    "memory": memory.section,
    "entries": entries.section,
    "ranks": ranks.section,
    "overhead": overhead.section,
    "scale": scale.section,
    "ddp": ddp.section,
    "resume": resume.section,
    "gpu": gpu_table.section,
}


def figures(name: str, found: dict[str, Any]) -> list[Figure]:
    """What matters of one part's figures."""
    return _FIGURES[name](found)


def _peers(found: dict[str, Any]) -> list[Figure]:
    rows = [row for row in found["rows"] if row["run"]]
    broken = [row["name"] for row in rows if row["promises"]["still"] is False or not row["promises"]["follows"]]
    said = f"{len(rows)} of {len(found['rows'])}, of which {len(broken)} break one: {', '.join(broken) or 'none'}"
    return [("contenders whose two promises were watched", said, "nothing else moves; moments <= 2 an entry")]


def _memory(found: dict[str, Any]) -> list[Figure]:
    lisa, ist = found["lisa"], found["ist"]
    return [
        (
            "LISA(2), Llama-2-7B, worst peak around ten switches, to the floor",
            f"{lisa['worst']:.4f}",
            f"a plain loop that has only ever trained that set; bar {lisa['bar']}",
        ),
        ("IST on LoRA, state on the device, to LoRA's", f"{ist['share']:.3f}", f"bar {ist['bar']}"),
    ]


def _entries(found: dict[str, Any]) -> list[Figure]:
    worst = max(max(m["ratio"], m["entries_ratio"]) for m in found["memory"])
    step, bars = found["step"][0], found["bars"]
    shown: list[Figure] = [
        ("entries, bytes held, to the floor, worst", f"{worst:.4f}", f"20 k + 4 max n; bar {bars['memory']}"),
        (
            f"step at {step['share']:.0%}, to masked-dense AdamW",
            f"{step['to_masked']:.3f}",
            f"median of {step['turns']} turns; bar {bars['to_masked']}",
        ),
        (
            f"step at {step['share']:.0%}, to forward + backward",
            f"{step['to_alone']:.3f}",
            f"1 if choosing and stepping were free; bar {bars['to_alone']}",
        ),
    ]
    rival = found["rival"]
    if rival["run"]:
        shown.append((f"ID3's choice, to {rival['rival']}", f"{rival['choosing_ratio']:.3f}", f"bar {bars['rival']}"))
    return shown


def _ranks(found: dict[str, Any]) -> list[Figure]:
    times = [t for t in found["time"] if t["every"] == 1]
    return [
        *((f"AdaLoRA at rank {t['rank']}, a step's overhead, to PEFT's", f"{t['ratio']:.3f}", _bar(t)) for t in times),
        ("AdaLoRA, bytes after the final choice, over a LoRA of those ranks", f"{found['memory']['excess']:+.2%}", "0"),
    ]


def _bar(row: dict[str, Any]) -> str:
    barred = row["rank"] == ranks.BARRED
    return f"median of {row['pairs']} pairs" + (f"; bar {ranks.BAR}" if barred else "")


def _overhead(found: dict[str, Any]) -> list[Figure]:
    shares = [m["hooks_share"] for m in found["methods"].values()]
    return [
        ("hooks of the callback, of a step", f"{min(shares):.2%} to {max(shares):.2%}", f"bar {found['bar']:.0%}"),
    ]


def _scale(found: dict[str, Any]) -> list[Figure]:
    worst = max(row["optimizer"] / row["optimizer_floor"] for row in found["entries"])
    shown: list[Figure] = [("values, indices and moments, all sizes and shares, worst", f"{worst:.4f}", "16 k bytes")]
    for row in found["step"]:
        label = f"{row['model']}, {row['share']:.1%}: step, to forward + backward"
        shown.append((label, f"{row['ratio']:.3f} ({row['lowest']:.3f} to {row['highest']:.3f})", "1"))
    for row in found["selection"]:
        label = f"{row['model']}: one choice by gradients"
        shown.append((label, f"{1e3 * row['seconds']:.0f} ms", f"{row['to_passes']:.2f} of that step's passes"))
    return shown


def _ddp(found: dict[str, Any]) -> list[Figure]:
    if not found["run"]:
        return [("processes", "not run", found["reason"])]
    return [
        (
            f"{row['name']}: bytes a step and time, to DDP",
            f"{row['bytes'] / 2**20:.2f} MiB, {row['ratio']:.2f}",
            f"4 bytes for each entry that trains: {row['floor'] / 2**20:.2f} MiB",
        )
        for row in found["rows"]
    ]


def _resume(found: dict[str, Any]) -> list[Figure]:
    f = found["files"]
    shown = [
        (f"resume, {row['name']}, to plain Lightning", f"{row['ratio']:.2f}", f"{row['seconds']:.2f} s")
        for row in found["resume"][1:]
    ]
    share = f"{f['delta'] / f['full']:.4f} of all weights; LoRA of as many entries {f['lora'] / f['full']:.4f}"
    return [*shown, ("delta file, bytes an entry", f"{f['delta'] / f['entries']:.2f}", share)]


_FIGURES: Mapping[str, Callable[[dict[str, Any]], list[Figure]]] = {
    "peers": _peers,
    "memory": _memory,
    "entries": _entries,
    "ranks": _ranks,
    "overhead": _overhead,
    "scale": _scale,
    "ddp": _ddp,
    "resume": _resume,
    "gpu": gpu_table.figures,
}


def page(folder: Path) -> str:
    """The page of what ``folder`` holds: ``bench.json`` of the suite, and a JSON file for each part that has run."""
    suite = json.loads((folder / "bench.json").read_text())
    found = {name: folder / f"{name}.json" for name in SECTIONS}
    results = {name: json.loads(path.read_text()) for name, path in found.items() if path.is_file()}
    lines = [
        "# Benchmarks",
        "",
        f"`{suite['command']}`, {suite['machine']}, Python {suite['python']}, torch {suite['torch']}. "
        "Times are shares within one run; bytes are the same in every run.",
        "",
        "| part | outcome | seconds | what | measured | floor, formula or bar |",
        "|---|---|---|---|---|---|",
    ]
    for name, part in suite["parts"].items():
        head = f"{name} | {_outcome(part)} | {part['seconds'] or ''}"
        shown = figures(name, results[name]) if name in results and part["outcome"] in ("passed", "MISSED") else []
        for what, measured, against in shown or [("", "", "")]:
            lines.append(f"| {head} | {what} | {measured} | {against} |")
            head = " | | "
    lines.append("")
    for name, result in results.items():
        if suite["parts"].get(name, {}).get("outcome") in ("passed", "MISSED"):
            lines += SECTIONS[name](result)
    return "\n".join(lines)


def _outcome(part: dict[str, Any]) -> str:
    return f"{part['outcome']}: {part['reason']}" if part["reason"] else str(part["outcome"])

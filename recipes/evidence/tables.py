"""The tables of the evidence, every figure of which comes from cells; what was not run says so."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion.recipes.evidence.cells import SEEDS, Records, chosen, reported, search
from apportion.recipes.evidence.methods import BY_KEY, METHODS, Method
from apportion.recipes.evidence.stats import Estimate, paired, verdict, within

NOT_RUN = "not run"


@dataclass(frozen=True)
class Measure:
    """One figure that a grid reports.

    Args:
        key: Name of the metric in a cell.
        title: Heading of its column.
        told: What sentences call it.
        higher: Whether higher is better.
        scale: Factor between the metric and what is shown.
        digits: Decimals.
        change: Whether what is shown is the change from the model before fine-tuning, the method ``base``.
    """

    key: str
    title: str
    told: str
    higher: bool = True
    scale: float = 1.0
    digits: int = 1
    change: bool = False


@dataclass(frozen=True)
class Layout:
    """How a grid is shown.

    Args:
        title: Heading of its page.
        about: What all its runs share.
        tasks: Keys of tasks with their titles.
        measures: What is reported.
    """

    title: str
    about: str
    tasks: Mapping[str, str]
    measures: tuple[Measure, ...]


LAYOUTS = {
    "encoder": Layout(
        "all-MiniLM-L6-v2 on short texts",
        "all-MiniLM-L6-v2 (22.6 million parameters) under mean pooling and a fresh linear head, which trains in all "
        "runs, at learning rate 0.01; batches of 16 rows of like length; AdamW with weight decay 0.01, a linear "
        "schedule with 10 % warm-up, bf16-mixed, on a CPU.",
        {"trec": "TREC", "sst2": "SST-2", "mrpc": "MRPC", "rte": "RTE"},
        (Measure("test/accuracy", "test accuracy, %", "test accuracy in points", scale=100.0),),
    ),
    "decoder": Layout(
        "a small Llama, pre-trained on public prose",
        "A Llama with a vocabulary of 2048 byte pairs, pre-trained by `python -m apportion.recipes.evidence pretrain` "
        "on WikiText-2's test text, Tiny Shakespeare and PubMedQA's abstracts. Test loss: of the answers of the task's "
        "test rows, in nats per token. Forgotten: what the loss on WikiText-2's validation text, never trained on, has "
        "gained; read it beside the test loss, as what learns less also forgets less. E2E's test rows are harder than "
        "its dev rows: they hold names that no training row holds. Instructions: trained on Alpaca's, tested on the "
        "ones that people wrote for Self-Instruct. AdamW with weight decay 0.01, a linear schedule "
        "with 10 % warm-up, bf16-mixed, on a CPU; embeddings train in full tuning alone.",
        {"e2e": "E2E", "gsm8k": "GSM8K", "instructions": "instructions"},
        (
            Measure("test/loss", "test loss", "test loss in nats per token", False, digits=3),
            Measure("held_out/loss", "forgotten", "held-out loss gained", False, digits=4, change=True),
        ),
    ),
}


@dataclass(frozen=True)
class Line:
    """One method on one task.

    Args:
        method: The method.
        rate: The learning rate that the search chose; None if it is not complete.
        edge: Whether that is the highest or the lowest that was tried, in words.
        trained: What trained, of one cell; None if none was run.
        values: For every measure, its values by seed.
        errors: Errors of cells that failed.
        state: What the table shows where there is no value.
    """

    method: Method
    rate: float | None
    edge: str
    trained: Mapping[str, Any] | None
    values: tuple[Mapping[int, float], ...]
    errors: tuple[str, ...]
    state: str


def line(records: Records, grid: str, task: str, method: Method, base: Sequence[float | None]) -> Line:
    """Collects one method on one task; ``base`` holds what changes are taken from, by measure."""
    measures = LAYOUTS[grid].measures
    rate = chosen(records, grid, task, method)
    cells = reported(records, grid, task, method)
    found = {cell.seed: record for cell, record in cells if record is not None}
    ran = {seed: record for seed, record in found.items() if record["error"] is None}
    values: list[dict[int, float]] = []
    for measure, before in zip(measures, base, strict=True):
        known = {seed: record["metrics"].get(measure.key) for seed, record in ran.items()}
        minus = (before if measure.change else 0.0) if before is not None or not measure.change else None
        values.append({s: measure.scale * (v - minus) for s, v in known.items() if v is not None and minus is not None})
    tried = search(records, grid, task, method)
    searched = [records.get(cell) for cell in tried]
    errors = tuple(r["error"] for r in [*searched, *found.values()] if r is not None and r["error"] is not None)
    done = sum(record is not None for record in searched)
    state = (
        "failed" if errors and not ran else f"search {done} of {len(searched)}" if done and rate is None else NOT_RUN
    )
    edge = "" if rate is None else within([*(cell.rate for cell in tried), rate])
    return Line(method, rate, edge, next((r["trained"] for r in ran.values()), None), tuple(values), errors, state)


def before(records: Records, grid: str, task: str) -> list[float | None]:
    """What the model before fine-tuning gives, by measure; None where that was not run."""
    cells = reported(records, grid, task, BY_KEY["base"])
    known = [r for _, r in cells if r is not None and r["error"] is None]
    found = ([r["metrics"].get(measure.key) for r in known] for measure in LAYOUTS[grid].measures)
    return [next((v for v in values if v is not None), None) for values in found]


def lines(records: Records, grid: str, task: str) -> list[Line]:
    """All methods on one task, in the order of the methods."""
    base = before(records, grid, task)
    return [line(records, grid, task, m, base) for m in METHODS if grid in m.grids]


def differences(found: Sequence[Line]) -> dict[str, tuple[Estimate | None, ...]]:
    """For every method with something to beat, its difference from that, by measure."""
    by_key = {one.method.key: one for one in found}
    return {
        one.method.key: tuple(
            paired(ours, theirs) for ours, theirs in zip(one.values, by_key[one.method.bar].values, strict=True)
        )
        for one in found
        if one.method.bar is not None
    }


def judged(found: Sequence[Line], one: Line, measure: Measure, difference: Estimate | None) -> str:
    """The verdict on a method in one measure; of a change it says where the two learning rates are not the same."""
    if one.method.bar is None:
        return ""
    bar = next(other for other in found if other.method.key == one.method.bar)
    apart = measure.change and difference is not None and one.rate != bar.rate
    return verdict(difference, measure.higher) + (f", at another rate than {bar.rate:g}" if apart else "")


def facts(records: Records, grid: str, task: str) -> Mapping[str, Any]:
    """What the cells say about the task itself, and the numbers of ``steps`` that they were trained for."""
    found: dict[str, Any] = {}
    steps: set[int] = set()
    for path in sorted((records.out / grid / task).glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        found |= record.get("facts") or {}
        if record.get("steps"):  # the model as it is has none
            steps.add(record["steps"])
    return {**found, "steps": sorted(steps)} if found or steps else {}


def table(records: Records, grid: str, task: str) -> list[str]:
    """The Markdown lines of one task."""
    layout, found = LAYOUTS[grid], lines(records, grid, task)
    beside = differences(found)
    headings = ["method", "unit", "trains at a step", "moved in the end", "learning rate", "seeds"]
    for measure in layout.measures:
        headings += [measure.title, "minus random", "verdict"]
    made = [f"## {layout.tasks[task]}", "", *_told(facts(records, grid, task)), "| " + " | ".join(headings) + " |"]
    made.append("|" + "---|" * len(headings))
    for one in found:
        seeds = max((len(values) for values in one.values), default=0)
        trained = one.trained or {}
        cells = [
            one.method.title,
            one.method.group,
            f"{trained['step_mean']:,.0f}" if trained else "",
            f"{trained['moved']:,}" if trained else "",
            f"{one.rate:g}{one.edge}" if one.rate else "",
            str(seeds),
        ]
        for at, measure in enumerate(layout.measures):
            values = tuple(one.values[at].values())
            cells.append(Estimate(values).told(measure.digits, measure.change) if values else one.state)
            difference = beside.get(one.method.key, (None,) * len(layout.measures))[at]
            cells.append(difference.told(measure.digits, sign=True) if difference else "")
            cells.append(judged(found, one, measure, difference))
        made.append("| " + " | ".join(cells) + " |")
    return [*made, ""]


def _told(found: Mapping[str, Any]) -> list[str]:
    told = []
    if "rows" in found:
        told.append("Rows: " + ", ".join(f"{count:,} {name}" for name, count in found["rows"].items()) + ".")
    if "majority" in found:
        told.append(f"Always the commonest class: {100 * found['majority']:.1f} %.")
    if "pretraining" in found:
        before = found["pretraining"]
        told.append(
            f"Pre-training: {before['steps']} steps, {before['tokens']:,} tokens, {before['distinct_tokens']:,} of "
            f"them distinct; held-out loss then {before['held_out']['val/loss']:.3f}."
        )
    if found.get("steps"):
        told.append(f"Optimizer steps: {' or '.join(map(str, found['steps']))}.")
    return [" ".join(told), ""] if told else []


def as_json(records: Records, grid: str) -> dict[str, Any]:
    """The same figures for programs."""
    layout = LAYOUTS[grid]
    made: dict[str, Any] = {}
    for task in layout.tasks:
        found = lines(records, grid, task)
        beside = differences(found)
        made[task] = {"facts": facts(records, grid, task), "methods": {}}
        for one in found:
            row: dict[str, Any] = {"rate": one.rate, "trained": one.trained, "bar": one.method.bar}
            row |= {"errors": list(one.errors), "state": None if any(one.values) else one.state}
            for at, measure in enumerate(layout.measures):
                difference = beside.get(one.method.key, (None,) * len(layout.measures))[at]
                row[measure.key] = {
                    "by_seed": one.values[at],
                    "difference": None if difference is None else difference.values,
                    "verdict": verdict(difference, measure.higher) if one.method.bar else None,
                }
            made[task]["methods"][one.method.key] = row
    return made


def status(out: Path, grid: str) -> str:
    """How many cells of each task were run, and which failed."""
    records, layout = Records(out), LAYOUTS[grid]
    methods = [m for m in METHODS if grid in m.grids]
    told = []
    for task in layout.tasks:
        searched = [records.get(c) for m in methods for c in search(records, grid, task, m)]
        shown = [r for m in methods for _, r in reported(records, grid, task, m)]
        failed = [r["cell"]["method"] for r in [*searched, *shown] if r is not None and r["error"] is not None]
        counts = f"search {sum(r is not None for r in searched)} of {len(searched)}, "
        counts += f"reported {sum(r is not None for r in shown)} of {len(methods) * len(SEEDS)}"
        told.append(f"{layout.tasks[task]}: {counts}" + (f", failed: {', '.join(failed)}" if failed else ""))
    return "\n".join(told)

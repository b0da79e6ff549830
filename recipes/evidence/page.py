"""What the evidence says, in files: a page and a picture for each grid, and one sentence for each method."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from apportion.recipes.evidence import tradeoff
from apportion.recipes.evidence.adapters import RANK
from apportion.recipes.evidence.cells import SEEDS, WIDENINGS, Records
from apportion.recipes.evidence.methods import BY_KEY, METHODS, Method
from apportion.recipes.evidence.sources import listed
from apportion.recipes.evidence.stats import Estimate
from apportion.recipes.evidence.tables import LAYOUTS, Line, Measure, as_json, differences, facts, judged, lines, table

NOTES = f"""\
Every figure is made from the cells beside this file by `python -m apportion.recipes.evidence tables`; each cell names
its commit, versions, learning rate, files and their checksums, and the checksum of the weights that it began with.

- Mean ± standard error over those of the seeds {", ".join(map(str, SEEDS))} that were run. The learning rate is
  the best of three on a dev split carved from the training rows, by a seed that is not reported; while the best is the
  highest or the lowest, the search goes one rate further, at most {WIDENINGS}. *Highest tried* and *lowest tried* mark
  an edge even so.
- *Minus random*: the difference from random choice of the same unit, seed by seed: both see the same batches. *Better*
  and *worse* mean that it is beyond the two-sided 95 % quantile of Student's t; with three seeds, 4.3 standard errors,
  with five 2.8. Of many such comparisons one in twenty would be there by chance. The seeds share one test set: its own
  sampling error is not in the ±.
- The bar of LISA is two layers drawn once instead of again and again; that of OwLore is LISA, whose draws are uniform;
  that of BAdam one layer drawn anew at each turn; that of HFT half of the matrices without its balance. ID3, LIFT,
  SIFT, PaFI and SPT are held to random entries, IST to random layers, AdaLoRA to random ranks, IncreLoRA to ranks
  that grow in random matrices.
- *Trains at a step* is the mean over the run of the entries that the optimizer moved, *moved in the end* those that
  differ from where they began; both without the head. Where entries are chosen, {RANK} (m + n) of each m x n matrix
  are, or as many over all: what LoRA of rank {RANK} has.
"""


def sentences(records: Records) -> list[str]:
    """One sentence for each method that has something to beat, on all tasks that it was run on."""
    found = {(grid, task): lines(records, grid, task) for grid, layout in LAYOUTS.items() for task in layout.tasks}
    return [f"- {sentence(method, found)}" for method in METHODS if method.bar is not None]


def sentence(method: Method, found: dict[tuple[str, str], list[Line]]) -> str:
    """What the runs say about one method."""
    assert method.bar is not None
    told = []
    for (grid, task), some in found.items():
        if grid not in method.grids:
            continue
        layout = LAYOUTS[grid]
        for measure, difference in zip(layout.measures, differences(some)[method.key], strict=True):
            if difference is not None:
                own = next(one for one in some if one.method.key == method.key)
                says = judged(some, own, measure, difference)
                amount = difference.told(measure.digits, sign=True)
                told.append(f"on {layout.tasks[task]} {measure.told} {amount} (n = {len(difference.values)}): {says}")
    beside = f"**{method.title}** against {BY_KEY[method.bar].title}"
    return f"{beside}: " + ("; ".join(told) + "." if told else "not run.")


def picture(records: Records, grid: str, path: Path) -> None:
    """Draws every seed as a dot and mean ± standard error over them, one panel for each measure and task with cells.

    Args:
        records: The cells that were run.
        grid: Name of the grid.
        path: Of the PNG file.
    """
    layout = LAYOUTS[grid]
    found = {task: [one for one in lines(records, grid, task) if one.values[0]] for task in layout.tasks}
    found = {task: some for task, some in found.items() if some}
    if not found:
        return
    high = 1.2 + 0.24 * max(len(some) for some in found.values())
    figure = Figure(figsize=(1.6 + 4.4 * len(found), high * len(layout.measures)), layout="constrained")
    panels = figure.subplots(len(layout.measures), len(found), squeeze=False)
    for at, measure in enumerate(layout.measures):
        for axes, (task, some) in zip(panels[at], found.items(), strict=True):
            _panel(axes, [(one, tuple(one.values[at].values())) for one in some], measure)
            axes.set_title(layout.tasks[task], fontsize=9)
            if "majority" in (known := facts(records, grid, task)):
                _majority(axes, 100 * known["majority"])
    figure.savefig(path, dpi=150)


def _panel(axes: Axes, shown: Sequence[tuple[Line, tuple[float, ...]]], measure: Measure) -> None:
    """One measure on one task: blue has something to beat, orange is what it has to beat."""
    for at, (one, values) in enumerate(shown):
        colour = "#0072B2" if one.method.bar else "#E69F00" if _is_bar(one.method) else "#777777"
        if values:
            mean = Estimate(values)
            axes.plot(values, [at] * len(values), "o", color=colour, alpha=0.45, markersize=4)
            axes.errorbar(mean.mean, at, xerr=mean.error or 0.0, fmt="|", color=colour, markersize=9, capsize=3)
    axes.set_yticks(range(len(shown)), [one.method.title for one, _ in shown], fontsize=7)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlabel(measure.title + (" (higher is better)" if measure.higher else " (lower is better)"), fontsize=8)
    axes.grid(axis="x", alpha=0.3)


def _majority(axes: Axes, share: float) -> None:
    """A line at the share of the commonest class, or where it lies if that is far from all methods."""
    low, high = axes.get_xlim()
    if share > low - (high - low):
        axes.axvline(share, color="#777777", linestyle=":", linewidth=1)
    else:
        told = f"\u2190 commonest class: {share:.1f} %"
        axes.annotate(told, (0.01, 0.01), xycoords="axes fraction", fontsize=7, color="#555555")


def _is_bar(method: Method) -> bool:
    return any(other.bar == method.key for other in METHODS)


def publish(out: Path, grids: Sequence[str] = tuple(LAYOUTS)) -> None:
    """Writes ``README.md``, and for each grid ``<grid>.md``, ``.json`` and pictures."""
    records = Records(out)
    out.mkdir(parents=True, exist_ok=True)
    for grid in grids:
        layout = LAYOUTS[grid]
        body = [text for task in layout.tasks for text in table(records, grid, task)]
        both = tradeoff.has(layout) and tradeoff.picture(records, grid, out / f"{grid}-both.png")
        if both:
            body += ["## Gained and forgotten", "", tradeoff.ABOUT, "", f"![both]({grid}-both.png)", ""]
            body += [text for task in layout.tasks for text in tradeoff.table(records, grid, task)]
        picture(records, grid, out / f"{grid}.png")
        shown = ["", f"![{layout.measures[0].title}]({grid}.png)", ""] if (out / f"{grid}.png").is_file() else [""]
        head = [f"# Evidence: {layout.title}", "", layout.about, "", NOTES.rstrip(), *shown]
        (out / f"{grid}.md").write_text("\n".join([*head, *body]).rstrip() + "\n", encoding="utf-8")
        made = json.dumps(as_json(records, grid), indent=1)
        (out / f"{grid}.json").write_text(made + "\n", encoding="utf-8")
    head = ["# Evidence: does choosing beat chance?", "", NOTES.rstrip(), "", "## Method by method", ""]
    pages = [f"- [{layout.title}]({grid}.md)" for grid, layout in LAYOUTS.items()]
    data = ["## Data", "", "The folder of `--data` holds files of these public repositories, unchanged:", "", *listed()]
    text = "\n".join([*head, *sentences(records), "", "## Tables", "", *pages, "", *data])
    (out / "README.md").write_text(text + "\n", encoding="utf-8")

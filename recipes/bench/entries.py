"""The bars of single entries: what they hold, what a step with them takes, and what choosing them takes.

    python -m apportion.recipes.bench.entries        writes results/entries.json

Memory, in bytes, the same in every run: the optimizer's state, fp32 values, gradients and indices, added up whenever a
dense gradient arrives and around the optimizer's step, against 20 bytes for each selected entry and one dense tensor.
Beside it the peak of everything above that of forward and backward alone, whose gradients are freed as they arrive.

Times are medians of ratios within one turn of rivals that take turns, each on a copy of its own: masked-dense AdamW
(gradients times a mask, the step, and what is not selected put back, as decay has moved it), the same without decay in
the optimizer (lean), forward and backward alone, and selective-optimizers of PyPI, which is fetched into a cache, or
left out if that fails. LIFT's refresh by subspace iteration is held to an exact SVD.
"""

from __future__ import annotations

import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from apportion.recipes.bench.arguments import parser, write
from apportion.recipes.bench.entry_bars import Size, memory
from apportion.recipes.bench.entry_rivals import fetched, refresh, selection_step
from apportion.recipes.bench.entry_times import capture, step_time

BARS = {"memory": 1.03, "to_masked": 0.80, "to_alone": 1.05, "rival": 0.25}
_MIB = 2**20
_SMALL = Size("30 M", 512, 1376, 8, tokens=1024)


@dataclass(frozen=True)
class Plan:
    """What is measured: models for memory, one for times, turns, shares, and matrices with ranks for refreshes."""

    memory: tuple[Size, ...] = (
        _SMALL,
        Size("120 M", 768, 2048, 16, tokens=64),
    )
    timed: Size = _SMALL
    shares: tuple[float, ...] = (0.001, 0.01, 0.05)
    share: float = 0.05
    turns: int = 11
    layers: tuple[tuple[tuple[int, int], float, bool], ...] = (
        ((512, 1376), 0.05, True),
        *((shape, share, False) for shape in ((512, 1376), (2048, 5504), (4096, 11008)) for share in (0.01, 0.05)),
    )
    layer_tokens: int = 1024
    layer_turns: int = 3
    threads: tuple[int, ...] = (1, 2)
    refreshes: int = 3
    matrices: tuple[tuple[tuple[int, int], int], ...] = (((512, 512), 32), ((1376, 512), 32), ((1280, 3456), 128))


def measure(plan: Plan, report: Callable[[str], Any], make: Callable[[], Any] = fetched) -> dict[str, Any]:
    """All figures of ``plan``, and which bars they pass.

    Args:
        plan: What is measured.
        report: Told what is going on.
        make: Gives the rival's function, see `apportion.recipes.bench.entry_rivals.fetched`.
    """
    memories = []
    for size in plan.memory:
        for share in plan.shares:
            report(f"memory, {size.label}, {share:.1%}")
            memories.append(memory(size, share))
    times = []
    for fused in (False, True):
        report(f"time of a step, {'fused' if fused else 'plain'} AdamW")
        times.append(step_time(plan.timed, plan.share, plan.turns, fused))
    captures = []
    for threads in plan.threads:
        for shape, share, rows in plan.layers:
            report(f"gradients of {shape[0]} x {shape[1]}, {threads} threads")
            captures.append(capture(shape, share, rows, plan.layer_tokens, plan.layer_turns, threads))
    report("ID3's selection step")
    rival: dict[str, Any]
    try:
        function = make()
    except Exception as error:  # no network, no index, another Python
        rival = {"run": False, "reason": str(error)}
    else:
        rival = selection_step(plan.timed, plan.share, plan.turns, function)
    refreshes = []
    for shape, rank in plan.matrices:
        for decaying in (True, False):
            report(f"refresh of {shape[0]} x {shape[1]}")
            refreshes.append(refresh(shape, rank, plan.share, plan.refreshes, decaying))
    passed: dict[str, bool | None] = {
        "memory": all(max(m["ratio"], m["entries_ratio"]) <= BARS["memory"] for m in memories),
        "to_masked": times[0]["to_masked"] <= BARS["to_masked"] and times[0]["same_weights"],
        "to_alone": times[0]["to_alone"] <= BARS["to_alone"],
        "rival": rival["choosing_ratio"] <= BARS["rival"] and rival["same_masks"] if rival["run"] else None,
    }
    figures = {"memory": memories, "step": times, "capture": captures, "rival": rival, "refresh": refreshes}
    return {"bars": BARS, "passed": passed, **figures}


def section(result: dict[str, Any]) -> list[str]:
    """The tables as Markdown."""
    verdicts = {True: "passed", False: "MISSED", None: "not run"}
    said = {bar: verdicts[outcome] for bar, outcome in result["passed"].items()}
    lines = [
        "## Single entries",
        "",
        f"`{result['command']}`, {result['seconds']} s, {result['device']}, torch {result['torch']}, transformers "
        f"{result['transformers']}. Llama-shaped models, fp32, random weights and tokens.",
        "",
        "### Memory on steps without selection",
        "",
        "In MiB, at the moment when they are most together.",
        "",
        "| model | selected | state | fp32 values | gradients | indices | dense | together | of 20 bytes an entry "
        "+ one dense tensor | without dense, of 20 bytes an entry | peak above forward + backward |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for m in result["memory"]:
        parts = [m[part] / _MIB for part in ("state", "masters", "gradients", "indices", "dense", "total")]
        cells = [f"{value:.1f}" for value in parts]
        lines.append(
            f"| {m['model']} | {m['selected']:,} ({m['share']:.1%}) | {' | '.join(cells)} | {m['ratio']:.4f} "
            f"| {m['entries_ratio']:.4f} | {m['above_alone'] / _MIB:.1f} |"
        )
    first = result["step"][0]
    lines += [
        "",
        f"The bar is {BARS['memory']}: {said['memory']}.",
        "",
        "Steps that select by gradients, in MiB:",
        "",
        "| model | selected | held | peak | peak above forward + backward |",
        "|---|---|---|---|---|",
        *(
            f"| {m['model']} | {m['share']:.1%} | {m['selection_held'] / _MIB:.1f} | {m['selection_peak'] / _MIB:.1f} "
            f"| {m['selection_above_alone'] / _MIB:.1f} |"
            for m in result["memory"]
        ),
        "",
        f"### Step at {first['share']:.0%}, {first['tokens']} tokens, median of {first['turns']} turns",
        "",
        "| optimizer | compact, s | masked-dense, s | lean masked-dense, s | forward + backward, s | to masked-dense "
        "| to lean | to forward + backward |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for t in result["step"]:
        cells = [f"{t[key]:.3f}" for key in ("compact", "masked", "lean", "alone", "to_masked", "to_lean", "to_alone")]
        lines.append(f"| {t['optimizer']} | {' | '.join(cells)} |")
    lines += [
        "",
        f"The bars, for the first line: {BARS['to_masked']} of masked-dense ({said['to_masked']}), {BARS['to_alone']} "
        f"of forward + backward ({said['to_alone']}).",
        "",
        "### Forward and backward of one linear layer, by the way its gradients are got",
        "",
        f"{result['capture'][0]['tokens']} tokens. Temporaries hold the gradient of the input in any case.",
        "",
        "| weight | selected | threads | hook, ms | tiled / hook | sampled / hook | temporaries, MiB: hook | tiled "
        "| sampled | auto |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {c['shape'][0]} x {c['shape'][1]} | {c['share']:.0%}{' of the rows' if c['rows'] else ''} "
            f"| {c['threads']} | {1e3 * c['hook']['seconds']:.0f} | {c['tiled']['to_hook']:.3f} "
            f"| {c['sampled']['to_hook']:.3f} | {c['hook']['temporaries'] / _MIB:.1f} "
            f"| {c['tiled']['temporaries'] / _MIB:.1f} | {c['sampled']['temporaries'] / _MIB:.1f} | {c['auto']} |"
            for c in result["capture"]
        ),
        "",
        "### ID3's selection step",
        "",
    ]
    r = result["rival"]
    if r["run"]:
        lines += [
            f"{r['entries']:,} candidates, {r['budget']:,} of them in {r['growth']} steps; masks "
            f"{'equal at every step' if r['same_masks'] else 'DIFFER'}.",
            "",
            f"| | ours, ms | {r['rival']}, ms | ratio |",
            "|---|---|---|---|",
            f"| choosing | {1e3 * r['choosing']:.0f} | {1e3 * r['rival_choosing']:.0f} | {r['choosing_ratio']:.3f} |",
            f"| the whole step but forward and backward | {1e3 * r['step']:.0f} "
            f"| {1e3 * r['rival_step']:.0f} | {r['step_ratio']:.3f} |",
            "",
            f"The bar for choosing is {BARS['rival']}: {said['rival']}.",
        ]
    else:
        lines.append(f"Not run: {r['reason']}")
    lines += [
        "",
        "### LIFT's refresh of one matrix against an exact SVD",
        "",
        "| matrix | rank | singular values | exact, s | cold, s | warm, s | cold / exact | warm / exact "
        "| same entries, cold | warm |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {f['shape'][0]} x {f['shape'][1]} | {f['rank']} | {f['values']} | {f['exact_seconds']:.3f} "
        f"| {f['cold_seconds']:.3f} | {f['warm_seconds']:.3f} | {f['cold_ratio']:.2f} | {f['warm_ratio']:.2f} "
        f"| {f['cold_overlap']:.2%} | {f['warm_overlap']:.2%} |"
        for f in result["refresh"]
    ]
    return [*lines, ""]


def main(arguments: Sequence[str] | None = None, plan: Plan | None = None) -> int:
    """Measures everything, writes ``entries.json``, and fails if a bar is missed."""
    made = parser("entries", __doc__)
    out: Path = made.parse_args(arguments).out
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.logging.set_verbosity_error()
    start = time.monotonic()
    with Console(stderr=True).status("") as status:
        figures = measure(plan or Plan(), status.update)
    result = {
        "command": "python -m apportion.recipes.bench.entries",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": f"CPU, {torch.get_num_threads()} threads",
        "seconds": round(time.monotonic() - start),
        **figures,
    }
    write(out, "entries", result, section(result))
    return 1 if False in result["passed"].values() else 0


if __name__ == "__main__":
    sys.exit(main())

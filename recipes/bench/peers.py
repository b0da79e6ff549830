"""Ours beside what one would use instead: memory by part, time of a step, and whether two promises hold.

    python -m apportion.recipes.bench.peers        writes results/peers.json

Every contender trains the same Llama-shaped model on the same tokens, and those of one group select the same layers or
entries (see `peers_layers` and `peers_entries`). Packages come from PyPI, each into a
folder of its own; what cannot be had is left out, and the reason stands in its row. Codes that are no package have a
twin of our own writing (see `twins`), which is not their code.

Memory: bytes by part at the peak of a few steps, and what is held between two steps beside the weights; the same in
every run. Time: a step beside one of AdamW on everything, on a copy of the model, turn by turn; median and range of the
ratios. Promises, looked at after every step: nothing moves but what the step was to train; at the end the optimizer
holds no more than two moments for each entry of the last selection.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from apportion.memory import Tracker
from apportion.recipes.bench import peers_entries, peers_layers
from apportion.recipes.bench.arguments import parser, write
from apportion.recipes.bench.entry_bars import Size
from apportion.recipes.bench.field import Contender, Rival, Trained, hushed, plain, whole

_MIB = 2**20
_NOTHING = torch.zeros((), dtype=torch.bool)
_CLEAR = 0.03  # shares by which one is said to be better
KINDS = {"ours": "ours", "package": "package", "twin": "twin of our own", "torch": "plain torch"}


@dataclass(frozen=True)
class Plan:
    """What is measured: the model, the steps that are followed, the turns that are timed, and who takes part."""

    size: Size = field(default_factory=lambda: Size("30 M", 512, 1376, 8, tokens=128))
    steps: int = 7
    turns: int = 7
    contenders: Callable[[], list[Contender]] = lambda: [*peers_entries.contenders(), *peers_layers.contenders()]


def tokens_of(size: Size, steps: int) -> list[Tensor]:
    """The first batches of the stream."""
    return list(islice(size.batches(), steps))


def memory(contender: Contender, size: Size, steps: int) -> dict[str, Any]:
    """Bytes by part at the peak of ``steps`` steps, and those held after the last one, but for the weights."""
    bare = size.build()
    own = sum(t.numel() * t.element_size() for t in [*bare.parameters(), *bare.buffers()])
    model, batches = contender.build(size), tokens_of(size, steps)
    beside = unlisted(model)
    with Tracker(model) as tracker:
        rival = contender.make(model, steps)
        tracker.mark("made")
        rival.run(batches, lambda trained: None)
        peak = tracker.mark("done").as_dict()
        now = tracker.now
    peak |= {"peak": peak["peak"] + beside, "temporaries": peak["temporaries"] + beside}
    return {
        **peak,
        "held": now.total + beside - own,
        "held_moments": sum(v.numel() * v.element_size() for v in rival.state()),
    }


def unlisted(model: nn.Module) -> int:
    """Bytes of tensors that modules keep in plain dictionaries, so that they are neither parameters nor buffers."""
    kept = [v for m in model.modules() for d in vars(m).values() if type(d) is dict for v in d.values()]
    return sum(v.numel() * v.element_size() for v in kept if type(v) is torch.Tensor)


def promises(contender: Contender, size: Size, steps: int) -> dict[str, Any]:
    """Whether the unselected stayed as it was at each of ``steps`` steps, and how many moments there are at the end."""
    rival = contender.make(contender.build(size), steps)
    before = _copied(rival)
    still, selected = True, 0

    def look(trained: Trained | None) -> None:
        nonlocal before, still, selected
        assert trained is not None
        selected = 0
        for name, p in rival.model.named_parameters():
            mask = trained.get(name, _NOTHING)
            selected += p.numel() if mask is None else int(mask.sum())
            if contender.kept and mask is not None:
                still = still and not bool(((p.detach() != before[name]) & ~mask).any())
        before = _copied(rival)

    rival.run(tokens_of(size, steps), look, look=True)
    state = sum(v.numel() for v in rival.state())
    return {
        "still": still if contender.kept else None,
        "selected": selected,
        "moments": state,
        "follows": state <= 2 * selected,
    }


def _copied(rival: Rival) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in rival.model.named_parameters()}


def times(contender: Contender, size: Size, turns: int, own: Contender | None = None) -> dict[str, Any]:
    """Seconds of a step, and its ratios to one of AdamW on everything and to ``own``; medians, and their ranges.

    All take turns on the same tokens, so that whatever else the machine does falls on all of them.
    """
    warm_up = 2
    batches = tokens_of(size, turns + warm_up)
    rival = contender.make(contender.build(size), len(batches))
    beside = [plain(whole(size)), *([] if own is None else [own.make(own.build(size), len(batches))])]
    seconds: list[list[float]] = []
    began = time.perf_counter()

    def turn(trained: Trained | None) -> None:
        nonlocal began
        del trained
        took, batch = [time.perf_counter() - began], batches[len(seconds)]
        for other in beside:
            began = time.perf_counter()
            other.run([batch], lambda _: None)
            took.append(time.perf_counter() - began)
        seconds.append(took)
        began = time.perf_counter()

    rival.run(batches, turn)
    kept = seconds[warm_up:]
    return {
        "step": statistics.median(took[0] for took in kept),
        **_ratio([took[0] / took[1] for took in kept]),
        "turns": turns,
        "to_ours": None if own is None else _ratio([took[0] / took[2] for took in kept]),
    }


def _ratio(values: Sequence[float]) -> dict[str, float]:
    return {"ratio": statistics.median(values), "lowest": min(values), "highest": max(values)}


def measure(plan: Plan, report: Callable[[str], Any]) -> list[dict[str, Any]]:
    """A row for each contender; of one that fails, with the reason."""
    rows, everybody = [], plan.contenders()
    ours = {contender.group: contender for contender in everybody if contender.kind == "ours"}
    for contender in everybody:
        report(contender.name)
        row: dict[str, Any] = {key: getattr(contender, key) for key in ("name", "group", "kind", "note")}
        try:
            row |= {"memory": memory(contender, plan.size, plan.steps)}
            row |= {"promises": promises(contender, plan.size, plan.steps)}
            own = ours.get(contender.group) if contender.kind != "ours" else None
            row |= {"time": times(contender, plan.size, plan.turns, own), "run": True}
        except Exception as error:  # of others' code, or no network: the rest is measured all the same
            said = str(error).strip().splitlines() or ["no message"]
            row |= {"run": False, "reason": f"{type(error).__name__}: {said[0]}"}
        rows.append(row)
    return rows


def compared(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Where another is better than ours in the same group, by more than 3 %, one sentence each."""
    said = []
    for own in [row for row in rows if row["kind"] == "ours" and row["run"]]:
        for other in [row for row in rows if row["group"] == own["group"] and row["kind"] != "ours" and row["run"]]:
            found = {
                "peak": (other["memory"]["peak"], own["memory"]["peak"]),
                "held between steps": (other["memory"]["held"], own["memory"]["held"]),
                "time of a step": (other["time"]["to_ours"]["ratio"], 1.0),
            }
            better = [f"{what} {a / b:.2f} of ours" for what, (a, b) in found.items() if b and a < (1.0 - _CLEAR) * b]
            if better:
                said.append(f"{other['name']} is better than {own['name']}: {', '.join(better)}.")
    return said or ["No other is better than ours in the same group by more than 3 % in any column."]


def section(result: dict[str, Any]) -> list[str]:
    """The table as Markdown."""
    lines = [
        "## Against peers",
        "",
        f"{result['model']}, fp32, {result['tokens']} tokens. Memory over {result['steps']} steps, MiB; held: between "
        "two steps, beside the model's own weights. Step: median and range of the ratios to a step of AdamW on "
        "everything, and to one of ours in the same group, all in turns.",
        "",
        "| | what | group | peak | gradients | optimizer | activations | rest | held | step / AdamW "
        "| step / ours | the unselected stays | state follows | moments / entry |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        head = f"| {row['name']} | {KINDS[row['kind']]} | {row['group']} |"
        if not row["run"]:
            lines.append(f"{head} not run: {row['reason']} |" + " |" * 10)
            continue
        m, t, p = row["memory"], row["time"], row["promises"]
        parts = ("peak", "gradients", "optimizer", "activations", "temporaries", "held")
        cells = " | ".join(f"{m[part] / _MIB:.1f}" for part in parts)
        lines.append(
            f"{head} {cells} | {_spread(t)} | {_spread(t['to_ours'])} | {_said(p['still'])} "
            f"| {_said(p['follows'])} | {p['moments'] / max(1, p['selected']):.2f} |"
        )
    notes = [f"{row['name']}: {row['note']}." for row in result["rows"] if row["note"] and row["run"]]
    lines += ["", *(f"- {line}" for line in [*compared(result["rows"]), *notes])]
    lines += [
        "- A twin of our own is not the authors' code: it holds and computes what that is described to.",
        "- For ranks the first promise has no meaning: one that is out learns on, so that it can come back.",
        "",
    ]
    return lines


def _spread(found: dict[str, Any] | None) -> str:
    return "" if found is None else f"{found['ratio']:.2f} ({found['lowest']:.2f} to {found['highest']:.2f})"


def _said(value: bool | None) -> str:
    return {True: "yes", False: "**no**", None: "-"}[value]


def main(arguments: Sequence[str] | None = None, plan: Plan | None = None) -> int:
    """Measures all contenders and writes ``peers.json``; fails if one of ours breaks a promise or cannot run."""
    made = parser("peers", __doc__)
    made.add_argument("--steps", type=int, default=7, help="steps whose memory and promises are followed")
    made.add_argument("--turns", type=int, default=7, help="turns that the medians are over")
    options = made.parse_args(arguments)
    plan = plan or Plan(steps=options.steps, turns=options.turns)
    began = time.monotonic()
    with hushed(), Console(stderr=True).status("") as status:
        rows = measure(plan, status.update)
    own = [row for row in rows if row["kind"] == "ours"]
    passed = all(row["run"] and row["promises"]["still"] is not False and row["promises"]["follows"] for row in own)
    result = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"CPU, {torch.get_num_threads()} threads",
        "model": plan.size.label,
        "tokens": plan.size.tokens,
        "steps": plan.steps,
        "seconds": round(time.monotonic() - began),
        "passed": passed,
        "rows": rows,
    }
    write(options.out, "peers", result, section(result))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

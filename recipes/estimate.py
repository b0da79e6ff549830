"""``apportion-estimate``: the peak memory of a fine-tuning run by part, told before it is run.

apportion-estimate --model llama-2-7b --method lisa --precision bf16-true --batch 1 --length 1024 --checkpointing
apportion-estimate --model mistral-7b --table --precision bf16-true --length 2048 --checkpointing
apportion-estimate --model llama-2-7b --method lisa --set train_embeddings=false --set active_layers=4 --json
apportion-estimate --model llama-2-7b --method adalora --lora-rank 12 --total-steps 5000 --checkpointing
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import transformers
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from apportion import callbacks
from apportion.estimate import OPTIMIZERS, Estimate
from apportion.fake import PRECISIONS
from apportion.ledger import Parts
from apportion.rank_selection import NOMINAL
from apportion.recipes.request import METHODS, ON_ADAPTERS, PRESETS, RANKS, REFUSED, Request, preset
from apportion.recipes.shapes import Shape, config_of, names

TABLE = ("full", "lora", "lisa", "ist", "badam", "hft")
_GIB = 2**30


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    try:
        return key, json.loads(value.lower() if value in ("True", "False") else value)
    except json.JSONDecodeError:
        return key, value


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="apportion-estimate", description=(__doc__ or "").split("\n")[0])
    add = made.add_argument
    add("--model", required=True, help=f"one of {', '.join(names())}; or a local folder or file with a config.json")
    add("--method", default="full", help=f"one of {', '.join(METHODS)}; or 'table' for {', '.join(TABLE)} side by side")
    add("--table", action="store_true", help="the same as --method table")
    add("--set", action="append", type=_setting, default=[], metavar="NAME=VALUE", help="a setting of the method")
    add("--precision", default="bf16-true", choices=list(PRECISIONS))
    add("--optimizer", default="adamw", choices=list(OPTIMIZERS), help="adamw is the loop form")
    add("--batch", type=_count, default=1, help="rows of a batch")
    add("--length", type=_count, default=1024, help="tokens of a row (text models)")
    add("--checkpointing", action="store_true", help="activation checkpointing, non-reentrant")
    add("--lora-rank", type=_count, default=32, help=f"for {', '.join(ON_ADAPTERS)}")
    add("--total-steps", type=_count, default=NOMINAL, help=f"optimizer steps of the run, for {', '.join(RANKS)}")
    add("--lora-targets", default="", help="names of linear maps, comma-separated; all but the head by default")
    add("--json", action="store_true", help="print JSON, in bytes")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``apportion-estimate``."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.logging.set_verbosity_error()
    made = parser()
    options = made.parse_args(arguments)
    chosen = list(TABLE) if options.table or options.method == "table" else [options.method]
    if chosen[0] not in (*METHODS, *REFUSED):
        made.error(f"`--method {options.method}` must be one of {', '.join(METHODS)}, table.")
    if options.set and (len(chosen) > 1 or chosen[0] not in PRESETS):
        made.error(f"`--set` needs one `--method` that has settings: {', '.join(PRESETS)}.")
    try:
        if options.set:
            _check(chosen[0], dict(options.set))
        results = _estimates(options, chosen)
    except ValueError as error:
        made.error(str(error))
    rows = [_row(options, method, result) for method, result in results.items()]
    if options.json:
        sys.stdout.write(json.dumps(rows[0] if len(rows) == 1 else rows, indent=2) + "\n")
    else:
        _show(rows, options)
    return 0


def _check(method: str, settings: Mapping[str, Any]) -> None:
    """Refuses values that the method cannot be made with.

    Raises:
        ValueError: If there is one; of several settings, it names the first that fails alone.
    """
    known = inspect.signature(getattr(callbacks, PRESETS[method])).parameters
    for tried in (*({key: value} for key, value in settings.items()), dict(settings)):
        try:
            preset(method, tried)
        except (TypeError, AttributeError, RuntimeError) as error:
            said = " ".join(f"`--set {key}={value}`" for key, value in tried.items())
            form = "; ".join(f"{key} is {known[key].annotation}, {known[key].default} by default" for key in tried)
            raise ValueError(f"{said}: {PRESETS[method]} cannot be made with it ({error}); {form}.") from None
        except ValueError:
            if tried == settings:
                raise  # alone, a setting may lack another one


def _estimates(options: argparse.Namespace, methods: Sequence[str]) -> dict[str, Estimate]:
    config = config_of(options.model)
    shape = Shape(config)
    built = f"the model is {shape.made}" + ("" if shape.named else ", as its config names no class")
    request = Request(
        config,
        settings=tuple(options.set),
        batch=options.batch,
        length=options.length,
        precision=options.precision,
        optimizer=options.optimizer,
        checkpointing=options.checkpointing,
        lora_rank=options.lora_rank,
        lora_targets=tuple(name for name in options.lora_targets.split(",") if name),
        total_steps=options.total_steps,
    )
    results: dict[str, Estimate] = {}
    with Console(stderr=True).status("") as status:
        for i, method in enumerate(methods, 1):
            status.update(f"{options.model}, {method} ({i} of {len(methods)}) ...")
            asked = replace(request, method=method)
            results |= asked.over_time() if method in RANKS else {method: asked.run()}
    return {name: replace(told, assumptions=(built, *told.assumptions)) for name, told in results.items()}


def _row(options: argparse.Namespace, method: str, result: Estimate) -> dict[str, Any]:
    asked = {name: getattr(options, name) for name in ("model", "precision", "batch", "length", "checkpointing")}
    return {
        "method": method,
        **asked,
        "optimizer_form": options.optimizer,
        "settings": dict(options.set),
        **result.as_dict(),
        "parameters": result.parameters,
        "trainable": result.trainable,
        "selected": list(result.selected),
        "assumptions": list(result.assumptions),
        "seconds": round(result.seconds, 2),
        **({"method": options.method, "moment": method, **asdict(result.moment)} if result.moment else {}),
    }


def _show(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    console = Console()
    title = f"{options.model}, {options.precision}, batch {options.batch} x {options.length}"
    over = f", {rows[0]['method']} over {options.total_steps:,} steps" if "moment" in rows[0] else ""
    console.print(f"[bold]{title}[/bold]{over}: GiB at the peak", highlight=False)
    table = Table(box=SIMPLE_HEAD)
    table.add_column("part")
    for row in rows:
        table.add_column(row.get("moment", row["method"]), justify="right")
    for name in [*Parts.__dataclass_fields__, "peak"]:
        table.add_row(name, *(f"{row[name] / _GIB:.2f}" for row in rows), style="bold" if name == "peak" else None)
    table.add_row("entries, M", *(f"{row['parameters'] / 1e6:,.0f}" for row in rows))
    table.add_row("training at a step, M", *(f"{row['trainable'] / 1e6:,.1f}" for row in rows))
    if any("ranks" in row for row in rows):
        table.add_row("steps done", *(f"{row['step']:,}" for row in rows))
        table.add_row("ranks in", *(f"{row['ranks']:,}" for row in rows))
        table.add_row("a matrix, mean", *(f"{row['ranks'] / row['matrices']:.1f}" for row in rows))
    console.print(table)
    console.print("Offloaded state is held by the CPU and is not in the peak. Taken for granted:", highlight=False)
    for line in dict.fromkeys(line for row in rows for line in row["assumptions"]):
        console.print(f"  - {line}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())

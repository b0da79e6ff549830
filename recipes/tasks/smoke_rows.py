"""A few made-up rows in the form that each data module reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_TRAIN, _OTHER = 12, 4
_WORDS = ("plain", "bright", "heavy", "quiet", "round", "green", "early", "proud")


def rows(module: str, settings: Mapping[str, Any], classes: int = 2, regression: bool = False) -> list[dict[str, Any]]:
    """Twelve rows to train on and four others, in the columns that the settings name.

    Args:
        module: Name of the data module.
        settings: Its settings, as in its config.
        classes: Number of classes.
        regression: Whether labels are numbers.

    Raises:
        ValueError: If no rows are known for the module.

    Example:
        >>> rows("Seq2SeqData", {"source": "document", "target": "summary"})[0]
        {'document': 'plain 0 plain 0', 'summary': 'plain 0'}
    """
    make = _MADE.get(module)
    if make is None:
        raise ValueError(f"`smoke=true` has no rows for `{module}`; it has for {', '.join(_MADE)}.")
    return [make(i, settings, classes, regression) for i in range(_TRAIN + _OTHER)]


def _thing(i: int) -> str:
    return f"{_WORDS[i % len(_WORDS)]} {i}"


def _labelled(i: int, settings: Mapping[str, Any], classes: int, regression: bool) -> dict[str, Any]:
    named = [settings["text"], settings["pair"]] if settings.get("pair") else [settings["text"]]
    kind = i if regression else i % classes
    target = i / 4 if regression else kind
    return {**{column: _thing(kind + k) for k, column in enumerate(named)}, settings["label"]: target}


def _instruction(i: int, settings: Mapping[str, Any], classes: int, regression: bool) -> dict[str, Any]:
    row = {settings["instruction"]: f"Add {i} and 2.", settings["output"]: f"The answer is {i + 2}.\n#### {i + 2}"}
    if settings.get("input"):
        row[settings["input"]] = _thing(i) if i % 2 else ""
    return row


def _pair(i: int, settings: Mapping[str, Any], classes: int, regression: bool) -> dict[str, Any]:
    return {settings["source"]: f"{_thing(i)} {_thing(i)}", settings["target"]: _thing(i)}


def _question(i: int, settings: Mapping[str, Any], classes: int, regression: bool) -> dict[str, Any]:
    answer, context = _thing(i), f"Here it is {_thing(i)} and there it is {_thing(i + 1)}."
    places = {"text": [answer], "answer_start": [context.index(answer)]}
    return {settings["question"]: "Here?", settings["context"]: context, settings["answers"]: places}


def _running(i: int, settings: Mapping[str, Any], classes: int, regression: bool) -> dict[str, Any]:
    return {settings["text"]: f"{_thing(i)}, " * 8}


def _picture(i: int, settings: Mapping[str, Any], classes: int, regression: bool) -> dict[str, Any]:
    grey = [[(37 * i + 11 * row * column) % 256 for column in range(8)] for row in range(8)]
    return {settings["image"]: grey, settings["label"]: i % classes}


_MADE: dict[str, Callable[[int, Mapping[str, Any], int, bool], dict[str, Any]]] = {
    "TextClassificationData": _labelled,
    "InstructionData": _instruction,
    "Seq2SeqData": _pair,
    "QuestionAnsweringData": _question,
    "CausalTextData": _running,
    "ImageData": _picture,
}

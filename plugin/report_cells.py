"""Values of configs as short texts, which differ where the values do."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

LONGEST = 60
"""Characters of a cell."""

ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "absent"})()
"""In the place of a value that is not there; its cell is empty."""


def canonical(value: Any) -> str:
    """A value of a config as JSON, the same text for the same value only, in any order of keys.

    Example:
        >>> canonical({"b": 1, "a": [True, "x "]}), canonical("1")
        ('{"a": [true, "x "], "b": 1}', '"1"')
    """
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=repr)  # a date is no text


def cells(values: Sequence[Any]) -> list[str]:
    """One text for each value, equal for equal values only: `brief` if that tells them apart, else what differs.

    Example:
        >>> cells([1e-4, "a\\n", "a ", "a "])
        ['0.0001', '"a\\\\n"', '"a "', '"a "']
    """
    keys = ["" if value is ABSENT else canonical(value) for value in values]
    known = {key: value for key, value in zip(keys, values, strict=True) if key}
    alike: dict[str, list[str]] = {}
    for key, value in known.items():
        alike.setdefault(brief(value), []).append(key)
    shown: dict[str, str] = {}
    for text, twins in alike.items():
        shown |= zip(twins, [text] if len(twins) == 1 else _differing(list(map(_seen, twins))), strict=True)
    told = dict(zip(shown, unique(list(shown.values())), strict=True))
    return [told.get(key, "") for key in keys]


def brief(value: Any) -> str:
    """A value of a config in at most `LONGEST` characters: a class without its modules, other mappings as their keys.

    Example:
        >>> brief({"_target_": "torch.optim.AdamW", "lr": 0.1}), brief({"lisa": {}, "hft": {}}), brief(1e-4)
        ('AdamW', 'lisa + hft', '0.0001')
        >>> brief(f"/data/{'x' * 60}/english.jsonl")
        '/data/xxxxxxxxxxxxxxxxxxxxxxx…xxxxxxxxxxxxxxxx/english.jsonl'
    """
    if isinstance(value, Mapping) and "_target_" in value:
        text = str(value["_target_"]).rpartition(".")[2]
    elif isinstance(value, Mapping):
        text = " + ".join(map(str, value)) or "none"
    elif isinstance(value, list | tuple):
        text = ", ".join(map(brief, value)) or "none"
    elif value is None or isinstance(value, bool):
        text = {None: "none", True: "true", False: "false"}[value]
    else:
        text = f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())
    return _short(text if text.strip("-") else json.dumps(str(value)), LONGEST)  # a cell without a value is a dash


def _short(text: str, length: int) -> str:
    """A text without its middle if it is too long: names and paths often differ at their ends."""
    front = (length - 1) // 2
    return text if len(text) <= length else f"{text[:front]}…{text[front + 1 - length :]}"


def _seen(text: str) -> str:
    """JSON in which blanks that a page would fold are seen."""
    text = re.sub(" {2,}", lambda blanks: "␣" * len(blanks[0]), text)
    return "".join(letter if letter.isprintable() else f"\\u{ord(letter):04x}" for letter in text)


def _shared(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in same)


def _differing(texts: Sequence[str]) -> list[str]:
    """Texts that are not too long, with what differs between them in sight."""
    head = _shared(texts)
    rests = [text[len(head) :] for text in texts]
    tail = _shared([rest[::-1] for rest in rests])[::-1]
    own = (rest[: len(rest) - len(tail)] for rest in rests)
    third = LONGEST // 3
    parts = [_short(head, third) + _short(part, third) + _short(tail, third) for part in own]
    return [text if len(text) <= LONGEST else part for text, part in zip(texts, parts, strict=True)]


def unique(names: Sequence[str]) -> list[str]:
    """The same names, a number after those that are there already.

    Example:
        >>> unique(["a", "b", "a"])
        ['a', 'b', 'a (2)']
    """
    made: dict[str, None] = {}
    for name in names:
        tries = (name if at == 1 else f"{name} ({at})" for at in itertools.count(1))
        made[next(text for text in tries if text not in made)] = None
    return list(made)

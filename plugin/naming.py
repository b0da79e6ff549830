"""How the names of two sides match when one of them may stand under a prefix, as in a LightningModule's ``model.``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from apportion.categories import matches
from apportion.named import first_names, some


def prefixes(longer: Iterable[str], shorter: Collection[str]) -> Counter[str]:
    """How many of the ``longer`` names are a prefix (empty, or ending with a dot) and one of the ``shorter``.

    Example:
        >>> prefixes(["net.a.w", "net.b.w", "loss.w"], {"a.w", "b.w"})
        Counter({'net.': 2})
    """
    votes: Counter[str] = Counter()
    for name in longer:
        starts = [0, *(i + 1 for i, c in enumerate(name) if c == ".")]
        votes.update(name[:i] for i in starts if name[i:] in shorter)
    return votes


@dataclass(frozen=True)
class Renaming:
    """From names of one side to those of the other: ``stripped`` goes from their front, ``added`` comes before it."""

    added: str = ""
    stripped: str = ""

    def __call__(self, name: str) -> str:
        return self.added + name.removeprefix(self.stripped)


def renaming(wanted: Collection[str], available: Collection[str], prefix: str | None = None) -> Renaming:
    """How all ``wanted`` names become ``available`` ones: as they are, or with a prefix more or less.

    Args:
        wanted: Names of a file, each once.
        available: Names of a model.
        prefix: What one of the two sides has in front, or both; None finds it.

    Raises:
        ValueError: If no prefix, or more than one, brings all names together.

    Example:
        >>> renaming(["a.w"], ["model.a.w", "loss.w"]), renaming(["model.a.w"], ["a.w"])
        (Renaming(added='model.', stripped=''), Renaming(added='', stripped='model.'))
    """
    if prefix is None:
        ways = [Renaming(added=p) for p, n in prefixes(available, set(wanted)).items() if n == len(wanted)]
        ways += [Renaming(stripped=p) for p, n in prefixes(wanted, set(available)).items() if n == len(wanted) and p]
        ways = [Renaming()] if Renaming() in ways else ways
    else:
        front = dotted(prefix)
        tried = (Renaming(added=front), Renaming(stripped=front), Renaming(added=front, stripped=front))
        ways = [w for w in tried if all(n.startswith(w.stripped) and w(n) in available for n in wanted)][:1]
    if len(ways) > 1:
        raise ValueError(
            f"{len(ways)} parts of the model have all names, under {some(w.added or w.stripped for w in ways)}: say "
            "which one by `prefix=`."
        )
    if not ways:
        nearest = prefixes(available, set(wanted)).most_common(1)
        near = nearest[0][0] if nearest and prefix is None else dotted(prefix or "")
        missing = [name for name in wanted if near + name not in available]
        raise ValueError(
            f"The model lacks {some(missing or wanted)}, out of {len(wanted)} names; it has {some(available)}. If a "
            "prefix is the difference, pass `prefix=`; else the model has another architecture, or another head."
        )
    return ways[0]


@dataclass(frozen=True)
class Pairs:
    """How a tuned model's tensors relate to those of its base.

    Attributes:
        shared: Name to (name in the base, name in the tuned model).
        fresh: Name to name in the tuned model, of tensors that the base does not determine.
        prefix: What the names here have in front of the base's.
        dropped: Names, with that prefix, of what only the base has.
    """

    shared: Mapping[str, tuple[str, str]]
    fresh: Mapping[str, str]
    prefix: str = ""
    dropped: tuple[str, ...] = ()


def pair(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], prefix: str | None = None, fresh: str | None = None
) -> Pairs:
    """Finds for every tensor of ``tuned`` its counterpart in ``base``; the pairs have the base's names.

    Where a fresh tensor lies outside the prefix (a head beside a backbone), the pairs have the tuned model's names.

    Args:
        base: Tensors of the base.
        tuned: Tensors of the tuned model, maybe under a common prefix.
        prefix: The prefix of the part of ``tuned`` that counts; the rest is left out. None finds it.
        fresh: Regular expression on the last parts of names that do not come from the base.

    Raises:
        ValueError: If the two do not match, or several prefixes do equally well, or a tensor lies outside the prefix.

    Example:
        >>> from torch import ones
        >>> pair({"w": ones(1)}, {"net.w": ones(2), "net.head": ones(3)})
        Pairs(shared={'w': ('w', 'net.w')}, fresh={'head': 'net.head'}, prefix='', dropped=())
    """
    groups: dict[str, list[str]] = {}  # first name of a tensor to all its names
    for name, first in first_names(tuned).items():
        groups.setdefault(first, []).append(name)
    front = _front(base, tuned) if prefix is None else dotted(prefix)
    inside = {key: names for key, names in groups.items() if any(n.startswith(front) for n in names)}
    outside = [key for key in groups if key not in inside] if prefix is None else []
    lost = [name for name in outside if fresh is None or not matches(fresh, name)]
    if lost:
        raise ValueError(
            f"{some(lost)} lie outside `{front}`, where the base's tensors are: pass `prefix={front!r}` to leave out "
            "what lies outside, or name what belongs to the model in `fresh=`."
        )
    ahead = front if outside else ""
    shared: dict[str, tuple[str, str]] = {}
    new = {name: name for name in outside}
    of_base = first_names(base)  # not `in base`: a lazy mapping may read a tensor to answer
    met: set[str] = set()
    for key, names in inside.items():
        inner = [n.removeprefix(front) for n in names if n.startswith(front)]
        known = [n for n in inner if n in of_base]
        met.update(of_base[n] for n in known)
        if known and not (fresh is not None and any(matches(fresh, n) for n in (*names, *inner))):
            shared[ahead + known[0]] = (known[0], front + known[0])
        else:
            new[ahead + (known or inner)[0]] = key
    if fresh is not None and not any(matches(fresh, n) for names in (new, new.values()) for n in names):
        raise ValueError(f"`fresh={fresh!r}` matches no tensor of the tuned model; it has {some(groups)}.")
    everything = set(of_base.values())
    if 2 * len(met) < len(everything):
        raise ValueError(
            f"{len(met)} of the base's {len(everything)} tensors are found in the tuned model: the base has "
            f"{some(everything)}, the tuned model {some(groups)}. Is this its base? If only a prefix differs, pass "
            "`prefix=`."
        )
    return Pairs(shared, new, ahead, tuple(ahead + name for name in sorted(everything - met)))


def dotted(prefix: str) -> str:
    """A prefix with its dot at the end, or nothing."""
    return prefix if not prefix or prefix.endswith(".") else f"{prefix}."


def _front(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> str:
    votes = prefixes(tuned, set(base))
    best = [p for p, n in votes.items() if n == max(votes.values())]
    if len(best) > 1 and "" not in best:
        raise ValueError(f"The tuned model has the base's tensors under {some(best)} alike: say which by `prefix=`.")
    return best[0] if best and "" not in best else ""

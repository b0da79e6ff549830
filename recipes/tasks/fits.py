"""Whether samples fit the model that is to read them: torch's own words for an index out of range help nobody."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

_POSITIONS = re.compile(r"(^|\.)(position_embeddings|embed_positions|wpe)$")


def check(model: nn.Module, samples: Sequence[Mapping[str, Any]], where: str) -> None:
    """Refuses tokens that a model has no row for, and more of them than it has positions.

    Args:
        model: A transformers model.
        samples: With ``input_ids``, int64 of shape (length,); others pass.
        where: What the samples are called in the error.

    Raises:
        ValueError: If a sample does not fit.
    """
    texts = [ids for sample in samples if isinstance(ids := sample.get("input_ids"), Tensor) and ids.numel()]
    if not texts:
        return
    rows, most = tokens(model), max(int(ids.max()) for ids in texts)
    if rows is not None and most >= rows:
        raise ValueError(
            f"{where}: token {most} is none of the {rows} of the model: its tokenizer is another one. Set "
            "`data.tokenizer` to the folder or the id of the model."
        )
    places, longest = positions(model), max(len(ids) for ids in texts)
    if places is not None and longest > places:
        raise ValueError(
            f"{where}: a sample has {longest} tokens, and the model has {places} positions: `data.length` must be at "
            f"most {places}."
        )


def tokens(model: nn.Module) -> int | None:
    """Tokens that a model knows; None if it does not say."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None


def positions(model: nn.Module) -> int | None:
    """Positions that a model has learned; None if it computes them."""
    found = (module for name, module in model.named_modules() if _POSITIONS.search(name))
    return min((_usable(module) for module in found if isinstance(module, nn.Embedding)), default=None)


def _usable(embedding: nn.Embedding) -> int:
    """Some families begin to count behind the row of padding, some at a fixed offset."""
    before = 0 if embedding.padding_idx is None else embedding.padding_idx + 1
    return embedding.num_embeddings - max(before, int(getattr(embedding, "offset", 0)))

"""Ranks handed out before training: matrices compete for a total, and PEFT's LoRA does the rest.

    all values of all spectra, sorted;  r_k = how many of the ``budget`` largest belong to matrix k

A matrix gets at most ``cap`` times its rank in the configuration, and none at all if others have more use for it. The
scale of every adapter stays that of its rank in the configuration.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from apportion import spectra, sync
from apportion.patterns import any_of, exactly

SCORES = ("variance", "gradient", "weight")


def hand_out(values: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Ranks for each matrix: how many of the ``budget`` largest values are its own; ties go to the earlier matrix.

    Args:
        values: By matrix: what each further rank is worth, in falling order, shape (most ranks,).
        budget: Ranks in total, in [1, all values].

    Returns:
        Ranks by matrix, 0 included; they sum to ``budget``.

    Raises:
        ValueError: If there are fewer values, or one is not finite.

    Example:
        >>> values = {"q": torch.tensor([0.6, 0.3, 0.1]), "v": torch.tensor([0.4, 0.3, 0.3]), "o": torch.tensor([0.2])}
        >>> hand_out(values, 4)
        {'q': 2, 'v': 2, 'o': 0}
    """
    total = sum(len(row) for row in values.values())
    if not 1 <= budget <= total:
        raise ValueError(
            f"`hand_out(budget={budget})` must lie in [1, {total}], the ranks that the {len(values)} matrices may have "
            "together: lower it, or raise `cap`."
        )
    joined = torch.cat([row.double() for row in values.values()])
    if not bool(joined.isfinite().all()):
        wrong = next(name for name, row in values.items() if not bool(row.isfinite().all()))
        raise ValueError(f"`hand_out(...)` met a value of {wrong} that is not finite: look at weights and batches.")
    owners = torch.repeat_interleave(torch.tensor([len(row) for row in values.values()]))
    best = torch.argsort(joined, descending=True, stable=True)[:budget]
    counts: list[int] = torch.bincount(owners[best], minlength=len(values)).tolist()
    return dict(zip(values, counts, strict=True))


def with_ranks(config: Any, ranks: Mapping[str, int]) -> Any:
    """A copy of a LoRA configuration in which each matrix has its own rank, and those of rank 0 no adapter.

        alpha_k' = alpha_k r_k' / r_k,   with use_rslora alpha_k sqrt(r_k' / r_k)        so that the scale stays

    Args:
        config: A `peft.LoraConfig`.
        ranks: Ranks by the name of the matrix in the base model.
    """
    from peft.utils.other import get_pattern_key

    made = copy.deepcopy(config)
    kept = {name: rank for name, rank in ranks.items() if rank > 0}
    made.rank_pattern, made.alpha_pattern = {}, {}
    for name, rank in kept.items():
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
        share = rank / _rank(config, name)
        made.rank_pattern[exactly(name)] = rank
        made.alpha_pattern[exactly(name)] = alpha * (math.sqrt(share) if config.use_rslora else share)
    # The pattern names every matrix by itself, so that nothing is left to restrict.
    made.target_modules = any_of(kept)
    made.exclude_modules = made.layers_to_transform = made.layers_pattern = None
    return made


def allocate(
    model: nn.Module,
    config: Any,
    batches: Iterable[Any] | None = None,
    *,
    score: str = "variance",
    budget: int | None = None,
    cap: float = 2.0,
    loss_fn: Callable[[Any], Any] | None = None,
) -> Any:
    """Hands out ranks to the matrices that a LoRA configuration targets, once, before training.

    Args:
        model: The base model, on its device, before `peft.get_peft_model`; it is left as it was.
        config: A `peft.LoraConfig`, whose ranks (``r``, ``rank_pattern``) and scales are the starting point.
        batches: On the model's device; for ``variance`` and ``gradient``. Gone through once: a few are enough.
        score: ``variance``, ``gradient`` or ``weight``, see `apportion.spectra`.
        budget: Ranks in total; None for the sum of those in ``config``.
        cap: Ranks that a matrix may have, as a multiple of its rank in ``config``, at least 1.
        loss_fn: ``loss_fn(batch)`` runs ``model`` and gives the loss; None for ``model(**batch).loss``.

    Returns:
        A copy of ``config`` with ``rank_pattern``, ``alpha_pattern`` and ``target_modules``, the same on all ranks of a
        process group.

    Raises:
        TypeError: If ``config`` is no `peft.LoraConfig`, or one of AdaLoRA.
        ValueError: If the configuration targets nothing, or what is no linear map; if batches are missing; or if the
            budget is out of reach.

    Example:
        >>> from peft import LoraConfig
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> for linear, values in zip(model, ([2.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0])):
        ...     _ = linear.weight.data.copy_(torch.diag(torch.tensor(values)))
        >>> found = allocate(model, LoraConfig(r=2, lora_alpha=4, target_modules=["0", "1"]), score="weight")
        >>> found.rank_pattern, found.alpha_pattern
        ({'^0': 1, '^1': 3}, {'^0': 2.0, '^1': 6.0})

    References:
        Paischer et al., *Parameter Efficient Fine-tuning via Explained Variance Adaptation*, 2024,
        https://arxiv.org/abs/2410.07170 (``variance``; its initialization is PEFT's ``init_lora_weights="eva"``)
    """
    call = f"allocate(score={score!r})"
    if score not in SCORES:
        raise ValueError(f"`{call}` must be one of {', '.join(SCORES)}.")
    if not cap >= 1.0:
        raise ValueError(f"`allocate(cap={cap!r})` must be at least 1: it is a multiple of the rank in the config.")
    if score != "weight" and batches is None:
        raise ValueError(f"`{call}` looks at data: give `batches`.")
    modules = _targets(model, config)
    sides = {n: spectra.width(m) if score == "variance" else min(m.weight.shape) for n, m in modules.items()}
    most = {name: min(round(cap * _rank(config, name)), side) for name, side in sides.items()}
    run = loss_fn or (lambda batch: model(**batch).loss)
    if score == "variance":
        values = spectra.variance(model, modules, most, run, batches)
    elif score == "gradient":
        values = spectra.gradient(model, modules, most, run, batches or ())
    else:
        values = spectra.weight(modules, most)
    ranks = hand_out(values, sum(_rank(config, name) for name in modules) if budget is None else budget)
    sync.agree(f"the ranks of `{call}`", str(ranks))
    return with_ranks(config, ranks)


def _targets(model: nn.Module, config: Any) -> dict[str, Any]:
    """The linear maps that PEFT would adapt, by name, in model order."""
    from peft import AdaLoraConfig, LoraConfig
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
    from transformers.pytorch_utils import Conv1D

    if not isinstance(config, LoraConfig) or isinstance(config, AdaLoraConfig):
        raise TypeError(
            f"`allocate(config={type(config).__name__})` takes a `peft.LoraConfig`; AdaLoRA moves ranks while it "
            "trains: use `apportion.callbacks.AdaLoRA`."
        )
    if hasattr(model, "peft_config"):
        raise ValueError("`allocate(model)` has adapters already: give the base model, before `peft.get_peft_model`.")
    if config.init_lora_weights == "eva":
        raise ValueError(
            '`allocate(config=LoraConfig(init_lora_weights="eva"))`: PEFT would hand out the ranks again: use another '
            "initialization, or PEFT's own `initialize_lora_eva_weights`."
        )
    if config.target_modules is None:
        raise ValueError("`allocate(config=LoraConfig(target_modules=None))`: name the modules, or give 'all-linear'.")
    whole = _maybe_include_all_linear_layers(copy.deepcopy(config), model)
    found = {name: m for name, m in model.named_modules() if name and check_target_module_exists(whole, name)}
    other = [f"{name} ({type(m).__name__})" for name, m in found.items() if not isinstance(m, nn.Linear | Conv1D)]
    if other or not found:
        told = f"also {other[0]}, which is no linear map: leave it out" if other else "no module of the model"
        raise ValueError(f"`allocate(config=LoraConfig(target_modules={config.target_modules!r}))` targets {told}.")
    return found


def _rank(config: Any, name: str) -> int:
    """The rank that the configuration gives the adapter of a matrix."""
    from peft.utils.other import get_pattern_key

    return int(config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r))

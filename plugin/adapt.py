"""A plan put on a model: adapters where it is structured, beside single entries everywhere else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from apportion import randomness
from apportion.bottleneck import attach
from apportion.categories import parameters
from apportion.discovery import joined, unwrapped, walk
from apportion.plan_file import Plan


def matrices(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Shapes (d_out, d_in) of the weights that an adapter can be put beside, by parameter name.

    These are the weights of `nn.Linear` and of the `Conv1D` of transformers that one module alone uses. Left out are
    the output projections of `nn.MultiheadAttention`, which are never called as modules, and what has adapters already.

    Example:
        >>> matrices(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4), nn.LayerNorm(4)))
        {'1.weight': (4, 3)}
    """
    return {joined(name, "weight"): _shape(module) for name, module in _adaptable(unwrapped(model))}


def adapt(
    model: nn.Module,
    plan: Plan,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    name: str = "default",
) -> Plan:
    """Puts the adapters of ``plan`` on ``model``, whose output stays the same bit for bit until they train.

        lora      W x + (alpha / r) B A dropout(x),   B = 0 at first; by PEFT, on exactly these modules
        adapter   h + up(gelu(down(dropout(h)))),     h = W x + b, up = 0 at first; see `apportion.bottleneck`

    The weights of the matrices themselves no longer require a gradient; nothing else is frozen. Adapters are fp32
    whatever the model's precision. It has to happen before the optimizer is made.

    Args:
        model: The model, changed in place.
        plan: With structured modules, such as `apportion.routing.Router.allocate` gives.
        rank: Rank r, or features of the bottleneck; None for what the plan was routed with.
        alpha: Numerator of the LoRA scale; None for r, a scale of 1.
        dropout: Share of what enters an adapter that is dropped in train mode.
        seed: Of the first values, equal on all ranks; global random numbers stay.
        name: Of the adapter in PEFT.

    Returns:
        The plan for the model as it is now: LoRA moves the parameters of a matrix to ``base_layer``, and the adapters'
        own parameters train whole.

    Raises:
        ValueError: If the plan does not fit the model, or a module can have no adapter.
        RuntimeError: If PEFT left a module out.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        >>> plan = Plan({"0.weight": torch.tensor([5])}, {"0.weight": (4, 3), "1.weight": (2, 4)}, {"1": "lora"})
        >>> plan = adapt(model, plan, rank=1)
        >>> list(plan.shapes), plan.count
        (['0.weight', '1.base_layer.weight', '1.lora_A.default.weight', '1.lora_B.default.weight'], 7)
    """
    model = unwrapped(model)
    plan.check(model)
    rank = plan.config.get("routing", {}).get("rank") if rank is None else rank
    if rank is None:
        raise ValueError("`adapt(rank=None)` needs a plan that was routed, which says its rank: give `rank=`.")
    modules = dict(_adaptable(model))
    for path in plan.structured:
        if path not in modules:
            raise ValueError(
                f"`adapt` cannot put an adapter on {path}: it must be an `nn.Linear` or a `Conv1D` that is called as a "
                "module, without adapters and with a weight of its own."
            )
    before = {id(p): (path, p, p.requires_grad) for path, p in reversed(parameters(model, "").items())}
    chosen = {kind: [path for path, k in plan.structured.items() if k == kind] for kind in ("lora", "adapter")}
    try:
        with randomness.seeded(seed):
            if chosen["lora"]:
                _lora(model, {path: modules[path] for path in chosen["lora"]}, rank, alpha, dropout, name)
            for path in chosen["adapter"]:
                attach(modules[path], rank, dropout)
    finally:  # PEFT freezes all of them
        for _, p, requires_grad in before.values():
            p.requires_grad_(requires_grad)
    for path in plan.structured:
        modules[path].weight.requires_grad_(False)
    return _renamed(model, plan, before)


def _lora(
    model: nn.Module, modules: Mapping[str, nn.Module], rank: int, alpha: float | None, dropout: float, name: str
) -> None:
    import peft

    paths = {id(module): path for path, module in model.named_modules()}  # wrappers inside the model are part of these
    exact = "|".join(re.escape(paths[id(module)]) for module in modules.values())
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=f"(?:{exact})",
        fan_in_fan_out=not any(isinstance(module, nn.Linear) for module in modules.values()),  # as Conv1D has it
    )
    peft.inject_adapter_in_model(config, model, adapter_name=name)
    layers = {id(getattr(m, "base_layer", None)): m for m in model.modules()}
    for path, module in modules.items():
        layer = layers.get(id(module))
        if layer is None:
            raise RuntimeError(f"PEFT put no LoRA on {path}: it does not know a `{type(module).__name__}`.")
        layer.train(module.training)
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoderLayer):
            for module in modules.values():
                layer = layers[id(module)]
                if layer in encoder.children():
                    # Without a hook it would read the bare weights in eval mode, past the adapters.
                    layer.register_forward_hook(_seen)


def _seen(module: nn.Module, args: Any, out: Any) -> None:
    """Does nothing; that it is there keeps `nn.TransformerEncoderLayer` from its fused path."""


def _renamed(model: nn.Module, plan: Plan, before: Mapping[int, tuple[str, nn.Parameter, bool]]) -> Plan:
    """The plan under the names that the parameters have now, with the adapters' own."""
    now = dict(reversed([(id(p), path) for path, p in parameters(model, "").items()]))
    names = {path: now[key] for key, (path, _, _) in before.items()}
    fresh: dict[str, tuple[int, ...]] = {}
    for path, p in parameters(model, "").items():
        if id(p) not in before:
            p.data = p.data.float() if p.dtype in (torch.float16, torch.bfloat16) else p.data
            fresh[path] = tuple(p.shape)
    return replace(
        plan,
        indices={names[path]: index for path, index in plan.indices.items()},
        shapes={names[path]: shape for path, shape in plan.shapes.items()} | fresh,
        dense=(*(names[path] for path in plan.dense), *fresh),
        scores={names[path]: scores for path, scores in plan.scores.items()},
    )


def _adaptable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    users: dict[int, int] = {}
    tuned: list[str] = []
    for path, module in walk(model):
        for p in module._parameters.values():
            users[id(p)] = users.get(id(p), 0) + 1
        if hasattr(module, "base_layer") or hasattr(module, "bottleneck"):
            tuned.append(path)
    for path, module in walk(model):
        plain = isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
        if not plain and type(module).__name__ != "Conv1D":
            continue
        weight: Any = module.weight
        inside = any(path == t or path.startswith(f"{t}.") for t in tuned)
        if path and not inside and weight.ndim == 2 and weight.is_floating_point() and users[id(weight)] == 1:
            yield path, module


def _shape(module: nn.Module) -> tuple[int, int]:
    weight: Any = module.weight
    rows, columns = weight.shape
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)

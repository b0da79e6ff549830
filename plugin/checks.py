"""Set-up refusals with advice: what would go wrong silently is an error that says the way out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from apportion import sync
from apportion.candidates import Candidates
from apportion.classes import kinds
from apportion.owner import Owner
from apportion.selection import Selection, Slots
from apportion.types import Bound

FIXED_SET = {
    "DeepSpeedStrategy": "DeepSpeed fixes the set of trainable parameters when it starts",
    "FSDPStrategy": "FSDP packs parameters into flat tensors, which cannot be selected from",
    "ModelParallelStrategy": "sharded parameters change their place in the optimizer when they are frozen, and "
    "are lost on resume",
    "XLAStrategy": "XLA compiles one graph per set of trainable parameters",
}

AVERAGES = {"WeightAveraging", "StochasticWeightAveraging"}


def strategy(trainer: Any, label: str) -> None:
    """Refuses strategies under which a changing set of trainable parameters drifts or is lost."""
    names = [kind.__name__ for kind in type(trainer.strategy).__mro__]
    for kind, reason in FIXED_SET.items():
        if kind in names:
            raise ValueError(
                f"`{label}` does not run under `Trainer(strategy=...)` of type `{kind}`: {reason}. Use "
                "`strategy='ddp'` or a single device, where memory follows the selection."
            )
    if trainer.world_size > 1 and "DDPStrategy" not in names:
        raise ValueError(
            f"`{label}` is not known to be right under `{names[0]}` with {trainer.world_size} processes: use 'ddp'."
        )
    settings = getattr(trainer.strategy, "_ddp_kwargs", {})
    if settings.get("static_graph"):
        raise ValueError(
            f"`{label}` changes which parameters train, which `static_graph=True` rules out: leave that option out."
        )
    if getattr(trainer.strategy, "_ddp_comm_hook", None) is not None:
        raise ValueError(
            f"`{label}` averages gradients itself, so a `ddp_comm_hook` would never run: leave that option out."
        )


def finders(trainer: Any) -> list[Any]:
    """The callbacks that look for a learning rate or a batch size, by training without the other callbacks."""
    return [c for c in trainer.callbacks if {"LearningRateFinder", "BatchSizeFinder"} & kinds(c)]


def neighbours(trainer: Any, label: str) -> None:
    """Refuses callbacks that decide about the same things."""
    ranks = [c.label for c in trainer.callbacks if getattr(getattr(c, "slots", None), "grain", None) == "rank"]
    for callback in trainer.callbacks:
        if ranks and AVERAGES & kinds(callback):
            raise ValueError(
                f"`{ranks[0]}` changes which ranks there are, and `{type(callback).__name__}` averages weights over "
                "steps: ranks that are out would come back, and tensors that change their shape do not fit its copy. "
                f"Leave the average out, or take it in a later fit without `{ranks[0]}`, of a plain LoRA of the ranks "
                "that are left (`apportion.lora_export.to_lora` makes it of AdaLoRA adapters)."
            )
        if "BaseFinetuning" in kinds(callback):
            raise ValueError(
                f"`{label}` and `{type(callback).__name__}` both set `requires_grad` and the param groups, and would "
                "undo each other: use one of them."
            )
        if callback in finders(trainer) and trainer.world_size > 1:
            raise ValueError(
                f"`{type(callback).__name__}` runs without the other callbacks, so that `{label}` could not average "
                f"gradients over {trainer.world_size} processes: run it on one process first."
            )


def meet(selection: Selection, owner: Owner, module: nn.Module) -> Bound:
    """Binds ``selection`` to the module as its user left it; refuses what cannot work on it or differs over ranks."""
    with owner.thawed():  # another selection on this run may have frozen its share already
        bound = selection.bind(module)
    # Under a compiled whole, hooks of entries fire when the backward pass is over: right, with all dense gradients.
    compiled(module, bound, changes(selection.slots) and not isinstance(bound, Candidates), selection.label)
    checkpointing(module, bound, selection.label)
    sync.agree(f"the configuration of `{selection.label}`", selection.describe())
    return bound


def compiled(module: nn.Module, bound: Bound, changes: bool, label: str) -> None:
    """Refuses a compiled module that holds several units of a changing set: every new set would be compiled anew."""
    if not changes:
        return
    whole = [module] if getattr(module, "_compiler_ctx", None) is not None else []
    whole += [m for m in module.modules() if _is_compiled(m)]
    for m in whole:
        inside = {id(child) for child in m.modules()}
        held = [unit.name for unit in bound.units if id(unit.module) in inside]
        if len(held) > 1:
            raise ValueError(
                f"A compiled `{type(getattr(m, '_orig_mod', m)).__name__}` holds {len(held)} units of `{label}`, such "
                f"as {held[0]} and {held[1]}: every new selection would be another graph, and after 8 of them it runs "
                "uncompiled. Compile each layer by itself, `for layer in layers: layer.compile()`, whose graphs are "
                "few and stay."
            )


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def checkpointing(module: nn.Module, bound: Bound, label: str) -> None:
    """Refuses reentrant activation checkpointing where what comes before the layers may be frozen."""
    for name, child in module.named_modules():
        function = getattr(child, "_gradient_checkpointing_func", None)
        if function is None or not getattr(child, "gradient_checkpointing", False):
            continue
        if getattr(function, "keywords", {}).get("use_reentrant", True) and not _feeds_gradient(module, bound):
            raise ValueError(
                f"`{name or type(module).__name__}` checkpoints activations reentrantly and `{label}` freezes "
                "what comes before its layers: "
                "selected layers would silently get no gradient. Use "
                "`gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})`."
            )


def _feeds_gradient(module: nn.Module, bound: Bound) -> bool:
    """Whether the first layer's input requires a gradient: a trained embedding, or transformers' hook on one."""
    whole = isinstance(bound, Candidates)  # units of entries keep the gradient whatever is selected
    feeding = {*bound.always, *(bound.names if whole else ())}
    trained = any(name in feeding for name in bound.found.get("embedding", ()))
    return trained or any(getattr(m, "_require_grads_hook", None) is not None for m in module.modules())


def buffers(bound: Bound, label: str) -> None:
    """Warns about running statistics, which move whatever is selected."""
    for unit in bound.units:
        for name, child in unit.module.named_modules():
            if isinstance(child, _BatchNorm) and child.track_running_stats:
                warnings.warn(
                    f"`{label}` freezes parameters; the running statistics of batch norms, such as "
                    f"{unit.name}.{name}, still move in training. Put these modules into eval mode if they must not.",
                    stacklevel=3,
                )
                return


def loader(trainer: Any, label: str) -> None:
    """Warns when the training data cannot be resumed in the middle of an epoch."""
    if not trainer.checkpoint_callbacks:
        return
    combined = getattr(trainer.fit_loop, "_combined_loader", None)
    for item in getattr(combined, "flattened", []):
        if not (hasattr(item, "state_dict") and hasattr(item, "load_state_dict")):
            warnings.warn(
                f"`{label}` resumes exactly, but `{type(item).__name__}` has no `state_dict`: a run resumed in the "
                "middle of an epoch starts that epoch's data anew. `apportion.loader.StatefulLoader` continues where "
                "it stopped.",
                stacklevel=3,
            )
            return


def skipped(optimizer: Optimizer) -> bool:
    """Whether nothing that ``optimizer`` holds has a gradient: no backward pass, as for a batch without a loss."""
    return all(p.grad is None for group in optimizer.param_groups for p in group["params"])


def gradients(owner: Owner, optimizer: Optimizer, bound: Bound, mask: Tensor, label: str) -> Iterator[str]:
    """After a backward pass, checks that the selected units got gradients, as far as ``optimizer`` holds them.

    Yields:
        Names of parameters without one in units where others have one.

    Raises:
        RuntimeError: If no parameter of a selected unit got a gradient, or one that must not train got one.
    """
    for unit, selected in zip(bound.units, mask.tolist(), strict=True):
        awake = [name for name, p in unit.params.items() if p.grad is not None and not owner.slots[p].trains]
        if awake:
            raise RuntimeError(
                f"`{label}` froze {awake[0]} of {unit.name}, yet it got a gradient: something sets `requires_grad` "
                "during the forward pass, as X-LoRA does with its experts. The selection would save nothing: leave "
                "`requires_grad` alone during the fit."
            )
        if not selected:
            continue
        trained = {
            name: owner.leaf(p)
            for name, p in unit.params.items()
            if p.requires_grad and owner.slots[p].optimizer is optimizer
        }
        without = [name for name, leaf in trained.items() if leaf.grad is None]
        if trained and len(without) == len(trained):
            raise RuntimeError(
                f"`{label}` selected {unit.name}, but none of its {len(trained)} parameters got a gradient, such as "
                f"{without[0]}. The usual reasons: reentrant activation checkpointing over frozen inputs (pass "
                "use_reentrant=False), a part of the model that the loss does not depend on (exclude it from the "
                "units), or a graph compiled for another selection."
            )
        yield from without


def entry_gradients(owner: Owner, optimizer: Optimizer, bound: Candidates, label: str) -> list[str]:
    """After a backward pass, names of tensors with selected entries that got no gradient, as far as ``optimizer`` holds
    them.

    Raises:
        RuntimeError: If none of them got one.
    """
    held = [
        (name, owner.narrow(p))
        for name, p in zip(bound.names, bound.tensors, strict=True)
        if owner.slots[p].trains and owner.slots[p].optimizer is optimizer and len(owner.narrow(p).index)
    ]
    without = [name for name, store in held if store.leaf.grad is None]
    if held and len(without) == len(held):
        raise RuntimeError(
            f"`{label}` selected entries of {len(held)} tensors, but none got a gradient, such as {without[0]}. "
            "The usual reasons: reentrant activation checkpointing over frozen inputs (pass use_reentrant=False), or a "
            "part of the model that the loss does not depend on (leave it out by `exclude=`)."
        )
    return without


def scaling(trainer: Any, label: str) -> None:
    """Refuses a gradient scaler where it unscales gradients before anybody knows which entries they choose."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and scaler.is_enabled():
        raise ValueError(
            f"`{label}` selects by the gradients of the step, and under manual optimization with '16-mixed' the scaler "
            "has finished with them before they are known to be the last: use 'bf16-mixed', automatic optimization, or "
            "a score of weights."
        )


def idle(trainer: Any, owner: Owner, label: str) -> None:
    """Refuses an optimizer with nothing to train under a gradient scaler, which would fail at its step."""
    if getattr(trainer.precision_plugin, "scaler", None) is None:
        return
    for optimizer in owner.optimizers:
        if not any(group["params"] for group in optimizer.param_groups):
            raise ValueError(
                f"`{label}` selects nothing that this `{type(optimizer).__name__}` holds, and a gradient scaler "
                "cannot step an optimizer without gradients: use 'bf16-mixed', one optimizer for all units, or keep a "
                "part of each always on."
            )


def changes(slots: Slots) -> bool:
    """Whether the selection may change during a run."""
    when = slots.select_when
    return when.end is None or when.end - when.begin > when.every

"""AdaLoRA adapters as plain LoRA: the singular values go into A, and ranks that are out are left behind.

    c_k B_k diag(E_k) A_k = (alpha_k / r_k) B_k' A_k'
    A_k' = rows of diag(E_k) A_k,  B_k' = columns of B_k,  both where E_ki is not 0

r_k is the number of ranks that matrix k is left with, and alpha_k = c_k r_k keeps its scale. Every tool that knows LoRA
can load, merge and serve the result; it costs what its ranks cost, and matrices without a rank nothing.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from apportion.adapters import Adapter
from apportion.discovery import unwrapped, walk
from apportion.patterns import any_of, exactly


def to_lora(model: nn.Module, folder: str | Path, adapter: str | None = None) -> dict[str, int]:
    """Writes the AdaLoRA adapter of ``model`` as a LoRA adapter that `peft.PeftModel.from_pretrained` loads.

    Args:
        model: The model in PEFT's hands; it stays as it is.
        folder: Where ``adapter_config.json`` and ``adapter_model.safetensors`` go.
        adapter: Name of the adapter, matched exactly; None for the active one.

    Returns:
        The rank of every matrix that has one left, by the name of its layer in the base model.

    Raises:
        ValueError: If there is no such adapter, or all of its ranks are out.

    Example:
        >>> import torch
        >>> from tempfile import mkdtemp
        >>> from peft import AdaLoraConfig, PeftModel, get_peft_model
        >>> config = AdaLoraConfig(init_r=3, target_r=1, total_step=1, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
        >>> layer = model.base_model.model[0]
        >>> _ = layer.lora_E["default"].data.copy_(torch.tensor([[0.5], [0.0], [2.0]]))
        >>> to_lora(model, folder := mkdtemp())
        {'0': 2}
        >>> again = PeftModel.from_pretrained(nn.Sequential(layer.base_layer), folder)
        >>> torch.allclose(again(torch.ones(1, 4)), model(torch.ones(1, 4)), atol=1e-5)
        True

    References:
        Zhang et al., *Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning*, ICLR 2023,
        https://arxiv.org/abs/2303.10512
    """
    from peft import LoraConfig

    # PEFT wraps the base model twice, in its own model and in the tuner; what it saves is named from the outer one.
    outer: Any = unwrapped(model)
    if not hasattr(outer, "peft_config") or not hasattr(outer, "base_model"):
        raise ValueError(f"`to_lora({type(outer).__name__}, ...)` needs a model from `peft.get_peft_model`.")
    name = outer.active_adapter if adapter is None else adapter
    base = outer.get_base_model()
    parts = [part for path, module in walk(base) if (part := _svd_part(path, module, name)) is not None]
    if not parts:
        raise ValueError(
            f"`to_lora(...)` found no AdaLoRA adapter {name!r}: the model has "
            f"{', '.join(map(repr, outer.peft_config))}."
        )
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for part in parts:
        kept = (part.e.detach().flatten() != 0).nonzero().flatten() if part.e is not None else None
        if kept is None or not len(kept):
            continue
        ranks[part.name], alphas[part.name] = len(kept), _scale(part) * len(kept)
        a, b = _folded(part, kept)
        tensors[f"base_model.model.{part.name}.lora_A.weight"] = a
        tensors[f"base_model.model.{part.name}.lora_B.weight"] = b
    if not ranks:
        raise ValueError(f"All ranks of the adapter {name!r} are out: there is nothing to export.")
    old = outer.peft_config[name]
    first = next(iter(ranks))
    config = LoraConfig(
        r=ranks[first],
        lora_alpha=alphas[first],  # no whole number: c was a scale at another rank
        rank_pattern={exactly(k): v for k, v in ranks.items()},
        alpha_pattern={exactly(k): v for k, v in alphas.items()},
        target_modules=any_of(ranks),
        lora_dropout=old.lora_dropout,
        fan_in_fan_out=old.fan_in_fan_out,
        bias=old.bias,
        modules_to_save=copy.deepcopy(old.modules_to_save),
        task_type=old.task_type,
        base_model_name_or_path=old.base_model_name_or_path,
        revision=old.revision,
        inference_mode=True,
    )
    _write(outer, name, config, tensors, Path(folder))
    return ranks


def _svd_part(path: str, module: Any, name: str) -> Adapter | None:
    if name not in getattr(module, "lora_E", {}):
        return None
    a, e, b = module.lora_A[name], module.lora_E[name], module.lora_B[name]
    return Adapter(path, module, name, a, b, e, a.shape[0])


def _scale(part: Adapter) -> float:
    """The factor c of the adapter; it stays that of the rank it was built with."""
    return float(part.module.scaling[part.adapter]) / (float(part.module.ranknum[part.adapter]) + 1e-5)


def _folded(part: Adapter, kept: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of plain LoRA: singular values in A, only the ranks that are in."""
    assert part.e is not None
    a = (part.a.detach() * part.e.detach())[kept].contiguous().cpu()
    b = part.b.detach()[:, kept].contiguous().cpu()
    kernel = getattr(part.module.get_base_layer(), "kernel_size", None)
    if kernel is not None:  # a convolution: A over the kernel, B over channels
        a, b = a.view(len(kept), -1, *kernel), b.view(*b.shape, *[1] * len(kernel))
    return a, b


def _write(outer: Any, name: str, config: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    others = get_peft_model_state_dict(outer, adapter_name=name)
    kept = {k: v.detach().cpu().contiguous() for k, v in others.items() if not re.search(r"\.lora_[AEB](\.|$)", k)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(kept | tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    config.save_pretrained(str(folder))

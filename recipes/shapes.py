"""Models by shape: a name of ``conf/shapes`` or a Hugging Face config on disk, to a model and a batch without data."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

_SHAPES = files("apportion.conf") / "shapes"
# How the class of a checkpoint ends, to the automatic class that builds it: those that compute a loss of their own.
_TASKS = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}
_HEADS = ("classifier", "score", "qa_outputs")  # trained whole where the rest gets adapters


def names() -> list[str]:
    """The shapes that come with the package."""
    return sorted(path.name.removesuffix(".yaml") for path in _SHAPES.iterdir() if path.name.endswith(".yaml"))


def fields(name: str) -> dict[str, Any]:
    """The configuration of a shape as its file has it.

    Raises:
        ValueError: If there is no such shape.
    """
    if name not in names():
        raise ValueError(f"`shape={name}` is none of {', '.join(names())}.")
    content = OmegaConf.to_container(OmegaConf.create((_SHAPES / f"{name}.yaml").read_text()))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def config_of(model: str) -> Any:
    """The transformers configuration of a shape by name, or of a local folder or ``config.json``.

    Raises:
        ValueError: If ``model`` is neither, or holds no config.
    """
    from transformers import AutoConfig

    if model in names():
        return AutoConfig.for_model(**fields(model))
    path = Path(model)
    if path.is_file() or (path / "config.json").is_file():
        try:
            return AutoConfig.from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # weights, damaged JSON, an unknown family: transformers fails in many ways
            said = " ".join(str(error).split())[:200]
            raise ValueError(
                f"`--model {model}` holds no config that transformers can read ({type(error).__name__}: {said}): give "
                "a Hugging Face folder or its config.json, not the weights."
            ) from None
    raise ValueError(
        f"`--model {model}` is neither a shape ({', '.join(names())}) nor a local folder or file with a "
        "Hugging Face config."
    )


@dataclass(frozen=True)
class Shape:
    """A model family's configuration, and how to build a model and a batch of it.

    Args:
        config: The transformers configuration.
        lora_rank: Rank of LoRA adapters on the linear maps, or 0 for none.
        lora_targets: Names of the linear maps that get adapters; empty for all but the head.
        svd: Whether the adapters are AdaLoRA's, with singular values.
    """

    config: Any
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()
    svd: bool = False

    @property
    def task(self) -> str:
        """The automatic class of transformers that builds the model; without ``architectures`` it predicts tokens.

        Raises:
            ValueError: If the config names a class without a loss of its own, such as a model without head.
        """
        named = self.named or "ForCausalLM"
        auto = next((auto for end, auto in _TASKS.items() if named.endswith(end)), None)
        if auto is None:
            raise ValueError(
                f"`architectures: [{named}]` in the config of the model: a step needs a class with a loss, which ends "
                f"with {', '.join(_TASKS)}. Write the one that is trained into a copy of the config."
            )
        return auto

    @property
    def named(self) -> str:
        """The class that the config names; empty if it names none."""
        return str((getattr(self.config, "architectures", None) or [""])[0])

    @property
    def made(self) -> str:
        """The class that is built.

        Raises:
            ValueError: If transformers has none for this task and family.
        """
        import transformers

        known = getattr(transformers, self.task)._model_mapping
        if type(self.config) not in known:
            named = f"`architectures: [{self.named}]`" if self.named else "No `architectures`"
            raise ValueError(
                f"{named} in the config of the model: {self.task} builds no model of {type(self.config).__name__}. "
                f"Name a class of transformers that ends with {', '.join(_TASKS)}."
            )
        kinds = known[type(self.config)]
        names = [kind.__name__ for kind in (kinds if isinstance(kinds, list | tuple) else [kinds])]
        return self.named if self.named in names else names[0]

    @property
    def experts(self) -> str | None:
        """How experts are multiplied: grouped, as a loop over experts would read how many tokens each has got."""
        counts = ("num_local_experts", "num_experts", "n_routed_experts")
        return "grouped_mm" if any(getattr(self.config, name, None) for name in counts) else None

    def build(self) -> nn.Module:
        """The model, with adapters if there is a rank."""
        import transformers

        options = {"experts_implementation": self.experts} if self.experts else {}
        model = getattr(transformers, self.task).from_config(self.config, **options)
        return self._adapted(model) if self.lora_rank else model  # type: ignore[no-any-return]

    def _adapted(self, model: Any) -> Any:
        from peft import AdaLoraConfig, LoraConfig, get_peft_model

        head = [name for name in _HEADS if hasattr(model, name)] or None
        shared: dict[str, Any] = {
            "lora_alpha": 2 * self.lora_rank,
            "target_modules": list(self.lora_targets) or "all-linear",
            "modules_to_save": head,
            "exclude_modules": head,
        }
        if self.svd:
            return get_peft_model(model, AdaLoraConfig(init_r=self.lora_rank, target_r=1, total_step=1, **shared))
        return get_peft_model(model, LoraConfig(r=self.lora_rank, **shared))

    def batch(self, size: int, length: int) -> dict[str, Tensor]:
        """A batch of ``size`` rows of ``length`` tokens (int64), or of images of the configured size (float32)."""
        if self.task == "AutoModelForImageClassification":
            side = self.config.image_size
            pixels = torch.zeros(size, getattr(self.config, "num_channels", 3), side, side)
            return {"pixel_values": pixels, "labels": torch.zeros(size, dtype=torch.int64)}
        longest = getattr(self.config, "max_position_embeddings", None)
        if longest is not None and length > longest:
            raise ValueError(f"`--length {length}` must lie in [1, {longest}], the positions of this model.")
        tokens = torch.zeros(size, length, dtype=torch.int64)
        rows = torch.zeros(size, dtype=torch.int64)
        if self.task == "AutoModelForSequenceClassification":
            return {"input_ids": tokens, "labels": rows}
        if self.task == "AutoModelForQuestionAnswering":
            return {"input_ids": tokens, "start_positions": rows, "end_positions": rows}
        return {"input_ids": tokens, "labels": tokens}

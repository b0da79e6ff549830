"""The small variant of any run: a tiny random model of the same family, a few made-up rows, a few steps, no network.

What is small or offline already, such as a model without weights or the digits, stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from apportion.recipes.shapes import fields
from apportion.recipes.tasks.smoke_rows import rows

STEPS = 6
_POSITIONS = 1024
# Sizes of a tiny model by the names that configurations have for them; a family takes those that it knows.
_SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "pooler_hidden_size", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), 4),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "num_key_value_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), _POSITIONS),
    "vocab_size": 384,  # bytes and the special tokens of the byte tokenizer
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "decoder_start_token_id": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sliding_window": None,
    "rope_scaling": None,
}
_PICTURE = {"image_size": 16, "patch_size": 4}
# Settings of callbacks, slots and adapters that count steps, batches, layers or ranks: what fits here at most.
_MOST = {
    **dict.fromkeys(("every", "warmup", "ramp", "begin"), 1),
    **dict.fromkeys(("interval", "probe_interval", "align_steps", "final", "batches", "active_layers"), 2),
    **dict.fromkeys(("rank", "lra_rank", "target_rank", "mean_rank"), 2),
    **dict.fromkeys(("progressive_step",), STEPS // 2),
    **dict.fromkeys(("max_steps", "finish"), STEPS),
    "min_side": 8,
}
_LEAST = {"matrices": 5}  # that grow at a time: few steps have to reach the budget
_COUNTS = ("budget", "amount", "target", "tau")  # of entries or ranks of the large model
_SHARE = 0.05
_RANKS = ("r", "init_r", "target_r")


def smoke(cfg: DictConfig) -> DictConfig:
    """The small variant of a config, which is left as it is.

    Model: the family of ``shape`` or ``model.config.model_type`` with width 32 and at most 4 layers over bytes. Data: a
    few rows of the right form. Callbacks: intervals, budgets and ranks that cannot fit are cut, so that a selection
    changes within 6 steps. Trainer: one process on the CPU, CSV log.

    Args:
        cfg: The composed config of ``conf/train.yaml``.

    Raises:
        ValueError: If the model has a path, but neither ``shape`` nor ``model.config`` names its family.
    """
    made = copy.deepcopy(cfg)
    OmegaConf.set_struct(made, False)
    OmegaConf.set_readonly(made, False)
    made.model = _model(cfg)
    made.data = _data(cfg)
    for group in ("callbacks", "units", "score", "budget", "rule", "effect"):
        if cfg.get(group) is not None:
            made[group] = _cut(OmegaConf.to_container(cfg[group]))
    made.peft = _cut(OmegaConf.to_container(cfg.peft))
    made.trainer = _trainer(OmegaConf.to_container(cfg.trainer))
    if cfg.get("logger"):
        folder = "${hydra:runtime.output_dir}"
        csv = {"_target_": "pytorch_lightning.loggers.CSVLogger", "save_dir": folder, "name": "log", "version": ""}
        made.logger = {"csv": csv}
    return made


def _model(cfg: DictConfig) -> dict[str, Any]:
    model: dict[str, Any] = OmegaConf.to_container(cfg.model)  # type: ignore[assignment]
    if model.get("path") is not None and not isinstance(model["path"], str):
        return model  # weights of ours
    given: Any = OmegaConf.to_container(cfg.model.config, resolve=True)
    if model.get("path") is not None:  # null is a value of its own in a whole configuration only
        given = {key: value for key, value in given.items() if value is not None}
    large = {**(fields(cfg.shape) if cfg.get("shape") else {}), "problem_type": None, **given}
    if "model_type" not in large:
        raise ValueError(
            f"`smoke=true` with `model.path={model.get('path')}` must know the family: give `shape=...`, a name in "
            "conf/shapes such as llama-2-7b, or `++model.config.model_type=llama`."
        )
    large.pop("architectures", None)
    model["config"] = tiny(large, _PICTURE if "train" in cfg.data else {})
    model["path"] = None
    for key, most in (("new_tokens", 8), ("beams", 2)):
        if key in model:
            model[key] = min(model[key], most)
    if "tokenizer" in model:
        model["tokenizer"] = None
    return model


def tiny(large: Mapping[str, Any], picture: Mapping[str, int] = _PICTURE) -> dict[str, Any]:
    """The configuration of a model of the same family, but of width 32.

    Args:
        large: A configuration with its ``model_type``.
        picture: Sizes of images and patches.

    Example:
        >>> made = tiny({"model_type": "llama", "hidden_size": 4096, "num_key_value_heads": 8, "rms_norm_eps": 1e-5})
        >>> made["hidden_size"], made["num_hidden_layers"], made["rms_norm_eps"], "d_ff" in made
        (32, 4, 1e-05, False)
    """
    from transformers import AutoConfig

    known = AutoConfig.for_model(large["model_type"])
    sizes = {key: value for key, value in {**_SIZES, **picture}.items() if hasattr(known, key) or key in large}
    renamed = getattr(known, "attribute_map", {})  # a size has one name, or the second would undo the first
    return {**large, **{key: value for key, value in sizes.items() if key not in renamed}}


def _data(cfg: DictConfig) -> dict[str, Any]:
    data: dict[str, Any] = OmegaConf.to_container(cfg.data)  # type: ignore[assignment]
    if "train" not in data:
        return data
    classes = cfg.model.config.get("num_labels") or len(data.get("labels") or ()) or 2
    made = rows(data["_target_"].rpartition(".")[2], data, classes, cfg.model.get("regression", False))
    data |= {"train": made[:12], "val": made[12:], "test": made[12:] if data.get("test") is not None else None}
    offline = {"path": None, "name": None, "columns": None, "holdout": 0, "limit": None, "num_workers": 0}
    data |= {key: value for key, value in offline.items() if key in data}
    most = {"batch_size": 4, "length": 64, "target_length": 16, "stride": 16, "size": _PICTURE["image_size"]}
    data |= {key: min(data[key], value) for key, value in most.items() if key in data}
    if "prompt" in data:  # one token for each byte of it
        data["length"] = max(len(data[key] or "") for key in ("prompt", "prompt_alone")) + 64
    if "tokenizer" in data:
        data["tokenizer"] = None
    return data


def _cut(node: Any) -> Any:
    """The same settings, with those that count what the large model or the long run has made to fit."""
    if isinstance(node, list):
        return [_cut(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {key: _fitting(node, str(key), value) for key, value in node.items()}


def _fitting(node: Mapping[Any, Any], key: str, value: Any) -> Any:
    if key == "budget" and isinstance(value, float):
        return max(value, _SHARE)  # what trains whole may be charged, and weighs more in a small model
    if isinstance(value, bool) or not isinstance(value, int):
        return _cut(value)
    if key in _RANKS:
        return min(value, 4)
    if key in _COUNTS and value > STEPS:
        return 2000 if str(node.get("_target_")).endswith(".SPT") and key == "target" else _SHARE
    most = min(value, _MOST.get(key, value))
    return max(most, _LEAST.get(key, most))


def _trainer(trainer: Any) -> dict[str, Any]:
    precision = str(trainer.get("precision", "32-true"))
    return {
        **trainer,
        "accelerator": "cpu",
        "devices": 1,
        "num_nodes": 1,
        "strategy": "auto",
        "precision": precision.replace("16-mixed", "bf16-mixed") if precision == "16-mixed" else precision,
        "max_steps": STEPS,
        "max_epochs": -1,
        "accumulate_grad_batches": min(trainer.get("accumulate_grad_batches", 1), 2),
        "val_check_interval": 1.0,
        "check_val_every_n_epoch": 1,
        "limit_val_batches": 1,
        "limit_test_batches": 1,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
    }

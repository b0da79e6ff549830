"""The table of model families: a tiny configuration each, and what the search must find in it.

A model is made by `build` from random weights, on first use, so that a test imports only the family that it asks for.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = SMALL | {"num_key_value_heads": 1, "head_dim": 8}
LM = "AutoModelForCausalLM"
LABELS = "AutoModelForSequenceClassification"
IMAGES = "AutoModelForImageClassification"


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        config: Name of transformers' configuration class.
        kwargs: What makes it tiny.
        auto: Name of the automatic class that makes the model.
        layers: Paths of the layer lists and their lengths, in model order; n is the sum.
        embedding: Modules or parameters with the role embedding, as prefixes of parameter names.
        head: The same for the head.
        norm: The same for final norms.
        other: The same for what has no role.
        target: Names of the matrices that PEFT adapts.
        ffn: Those of them that IA3 treats as feed-forward.
    """

    config: str
    kwargs: Mapping[str, Any]
    auto: str
    layers: Mapping[str, int]
    embedding: tuple[str, ...]
    head: tuple[str, ...]
    norm: tuple[str, ...]
    other: tuple[str, ...] = ()
    target: tuple[str, ...] = ("q_proj", "v_proj", "up_proj")
    ffn: tuple[str, ...] = ("up_proj",)

    @property
    def n(self) -> int:
        """Number of layers."""
        return sum(self.layers.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Paths of the layers, in order."""
        return tuple(f"{path}.{i}" for path, count in self.layers.items() for i in range(count))


def llama_like(config: str, n: int = 3, **changes: Any) -> Family:
    """A row for the decoders that are laid out as Llama is."""
    kwargs = GROUPED | {"num_hidden_layers": n}
    row: dict[str, Any] = {
        "auto": LM,
        "layers": {"model.layers": n},
        "embedding": ("model.embed_tokens",),
        "head": ("lm_head",),
        "norm": ("model.norm",),
    }
    extra = changes.pop("kwargs", {})
    return Family(config=config, kwargs=kwargs | extra, **(row | changes))


BERT = ("query", "value", "intermediate.dense")
BART = ("q_proj", "v_proj", "fc1")
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}

FAMILIES: dict[str, Family] = {
    "llama": llama_like("LlamaConfig"),
    "mistral": llama_like("MistralConfig", 2),
    "mixtral": llama_like("MixtralConfig", 2, kwargs=EXPERTS, target=("q_proj", "v_proj"), ffn=()),
    "qwen2": llama_like("Qwen2Config", 4),
    "qwen3": llama_like("Qwen3Config", 2),
    "gemma2": llama_like("Gemma2Config", 3, head=()),
    "gemma3": llama_like("Gemma3TextConfig", 3, head=()),
    "phi3": llama_like("Phi3Config", 2, target=("qkv_proj", "gate_up_proj"), ffn=("gate_up_proj",)),
    "gpt2": Family(
        "GPT2Config",
        {"vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32},
        LM,
        {"transformer.h": 3},
        embedding=("transformer.wte", "transformer.wpe"),
        head=(),
        norm=("transformer.ln_f",),
        target=("c_attn", "c_fc"),
        ffn=("c_fc",),
    ),
    "gpt_neox": Family(
        "GPTNeoXConfig",
        SMALL | {"num_hidden_layers": 3},
        LM,
        {"gpt_neox.layers": 3},
        embedding=("gpt_neox.embed_in",),
        head=("lm_head",),
        norm=("gpt_neox.final_layer_norm",),
        target=("query_key_value", "dense_h_to_4h"),
        ffn=("dense_h_to_4h",),
    ),
    "gptj": Family(
        "GPTJConfig",
        {"vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32, "rotary_dim": 4},
        LM,
        {"transformer.h": 3},
        embedding=("transformer.wte",),
        head=("lm_head",),
        norm=("transformer.ln_f",),
        target=("q_proj", "v_proj", "fc_in"),
        ffn=("fc_in",),
    ),
    "opt": Family(
        "OPTConfig",
        SMALL | {"ffn_dim": 24, "num_hidden_layers": 3, "word_embed_proj_dim": 16},
        LM,
        {"model.decoder.layers": 3},
        embedding=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        head=(),
        norm=("model.decoder.final_layer_norm",),
        target=BART,
        ffn=("fc1",),
    ),
    "bloom": Family(
        "BloomConfig",
        {"vocab_size": 40, "hidden_size": 16, "n_layer": 3, "n_head": 2},
        LM,
        {"transformer.h": 3},
        embedding=("transformer.word_embeddings", "transformer.word_embeddings_layernorm"),
        head=(),
        norm=("transformer.ln_f",),
        target=("query_key_value", "dense_h_to_4h"),
        ffn=("dense_h_to_4h",),
    ),
    "falcon": Family(
        "FalconConfig",
        {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "alibi": False},
        LM,
        {"transformer.h": 3},
        embedding=("transformer.word_embeddings",),
        head=(),
        norm=("transformer.ln_f",),
        target=("query_key_value", "dense_h_to_4h"),
        ffn=("dense_h_to_4h",),
    ),
    "mamba": Family(
        "MambaConfig",
        {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "state_size": 4, "time_step_rank": 2},
        LM,
        {"backbone.layers": 3},
        embedding=("backbone.embeddings",),
        head=(),
        norm=("backbone.norm_f",),
        target=("in_proj", "x_proj"),
        ffn=("in_proj",),
    ),
    "bert": Family(
        "BertConfig",
        SMALL | {"num_hidden_layers": 3, "num_labels": 3},
        LABELS,
        {"bert.encoder.layer": 3},
        embedding=("bert.embeddings",),
        head=("bert.pooler", "classifier"),
        norm=(),
        target=BERT,
        ffn=("intermediate.dense",),
    ),
    "roberta": Family(
        "RobertaConfig",
        SMALL | {"num_hidden_layers": 3, "num_labels": 3},
        LABELS,
        {"roberta.encoder.layer": 3},
        embedding=("roberta.embeddings",),
        head=("classifier",),
        norm=(),
        target=BERT,
        ffn=("intermediate.dense",),
    ),
    "deberta_v2": Family(
        "DebertaV2Config",
        SMALL
        | {
            "num_hidden_layers": 3,
            "num_labels": 3,
            "relative_attention": True,
            "position_buckets": 4,
            "norm_rel_ebd": "layer_norm",
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "pooler_hidden_size": 16,
        },
        LABELS,
        {"deberta.encoder.layer": 3},
        embedding=("deberta.embeddings", "deberta.encoder.rel_embeddings"),
        head=("pooler", "classifier"),
        norm=("deberta.encoder.LayerNorm",),
        target=("query_proj", "value_proj", "intermediate.dense"),
        ffn=("intermediate.dense",),
    ),
    "modernbert": Family(
        "ModernBertConfig",
        SMALL | {"num_hidden_layers": 3, "num_labels": 3, "cls_token_id": 1, "sep_token_id": 2},
        LABELS,
        {"model.layers": 3},
        embedding=("model.embeddings",),
        head=("head", "classifier"),
        norm=("model.final_norm",),
        target=("Wqkv", "Wi"),
        ffn=("Wi",),
    ),
    "electra": Family(
        "ElectraConfig",
        SMALL | {"embedding_size": 8, "num_hidden_layers": 3, "num_labels": 3},
        LABELS,
        {"electra.encoder.layer": 3},
        embedding=("electra.embeddings", "electra.embeddings_project"),
        head=("classifier",),
        norm=(),
        target=BERT,
        ffn=("intermediate.dense",),
    ),
    "albert": Family(
        "AlbertConfig",
        SMALL
        | {"embedding_size": 8, "num_hidden_layers": 6, "num_hidden_groups": 2, "inner_group_num": 2, "num_labels": 3},
        LABELS,
        {"albert.encoder.albert_layer_groups": 2},
        embedding=("albert.embeddings", "albert.encoder.embedding_hidden_mapping_in"),
        head=("albert.pooler", "classifier"),
        norm=(),
        target=("query", "value", "ffn"),
        ffn=("ffn",),
    ),
    "t5": Family(
        "T5Config",
        {
            "vocab_size": 40,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_decoder_layers": 3,
            "num_heads": 2,
        },
        "AutoModelForSeq2SeqLM",
        {"encoder.block": 2, "decoder.block": 3},
        embedding=("shared",),
        head=(),
        norm=("encoder.final_layer_norm", "decoder.final_layer_norm"),
        target=("q", "v", "wi"),
        ffn=("wi",),
    ),
    "bart": Family(
        "BartConfig",
        {
            "vocab_size": 40,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_position_embeddings": 32,
        },
        "AutoModelForSeq2SeqLM",
        {"model.encoder.layers": 2, "model.decoder.layers": 3},
        embedding=(
            "model.shared",
            "model.encoder.embed_positions",
            "model.encoder.layernorm_embedding",
            "model.decoder.embed_positions",
            "model.decoder.layernorm_embedding",
        ),
        head=(),
        norm=(),
        target=BART,
        ffn=("fc1",),
    ),
    "whisper": Family(
        "WhisperConfig",
        {
            "vocab_size": 40,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        "AutoModelForSpeechSeq2Seq",
        {"model.encoder.layers": 2, "model.decoder.layers": 3},
        embedding=(
            "model.encoder.conv1",
            "model.encoder.conv2",
            "model.encoder.embed_positions",
            "model.decoder.embed_tokens",
            "model.decoder.embed_positions",
        ),
        head=(),
        norm=("model.encoder.layer_norm", "model.decoder.layer_norm"),
        target=BART,
        ffn=("fc1",),
    ),
    "vit": Family(
        "ViTConfig",
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "num_labels": 3,
        },
        IMAGES,
        {"vit.layers": 3},
        embedding=("vit.embeddings",),
        head=("classifier",),
        norm=("vit.layernorm",),
        target=BART,
        ffn=("fc1",),
    ),
    "swin": Family(
        "SwinConfig",
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [2, 1, 3],
            "num_heads": [1, 2, 4],
            "window_size": 2,
            "num_labels": 3,
        },
        IMAGES,
        {"swin.encoder.layers.0.blocks": 2, "swin.encoder.layers.1.blocks": 1, "swin.encoder.layers.2.blocks": 3},
        embedding=("swin.embeddings",),
        head=("classifier",),
        norm=("swin.layernorm",),
        other=("swin.encoder.layers.0.downsample", "swin.encoder.layers.1.downsample"),
        target=BART,
        ffn=("fc1",),
    ),
    "clip": Family(
        "CLIPConfig",
        {
            "text_config": SMALL | {"num_hidden_layers": 2},
            "vision_config": {
                "hidden_size": 24,
                "intermediate_size": 32,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
            },
            "projection_dim": 12,
        },
        "AutoModel",
        {"text_model.encoder.layers": 2, "vision_model.encoder.layers": 3},
        embedding=("text_model.embeddings", "vision_model.embeddings"),
        head=("text_projection", "visual_projection"),
        norm=("text_model.final_layer_norm", "vision_model.pre_layrnorm", "vision_model.post_layernorm"),
        other=("logit_scale",),
        target=BART,
        ffn=("fc1",),
    ),
    "llava": Family(
        "LlavaConfig",
        {
            "text_config": GROUPED | {"model_type": "llama", "num_hidden_layers": 3},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 24,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
                "projection_dim": 12,
            },
            "image_token_index": 3,
        },
        "AutoModelForImageTextToText",
        {"model.language_model.layers": 3},
        embedding=("model.language_model.embed_tokens",),
        head=("lm_head",),
        norm=("model.language_model.norm",),
        other=("model.vision_tower", "model.multi_modal_projector"),
    ),
}


KINDS = ("lora", "dora", "ia3")
"""Adapters that PEFT puts on the targets of every family above."""

REFUSALS: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("mamba", "lora", {"target_modules": ["out_proj"]}, "incompatible with Mamba"),
    ("mamba", "dora", {"target_modules": ["conv1d"]}, "incompatible with Mamba"),
    ("mamba", "ia3", {"target_modules": ["conv1d"]}, "Conv1d.*is not supported"),
    ("mixtral", "lora", {"target_modules": ["experts"]}, "MixtralExperts.*is not supported"),
    ("mixtral", "dora", {"target_parameters": ["mlp.experts.down_proj"]}, "does not work with use_dora"),
    ("mixtral", "ia3", {"target_modules": ["experts"]}, "MixtralExperts.*is not supported"),
    ("whisper", "ia3", {"target_modules": ["conv1"]}, "Conv1d.*is not supported"),
    ("bert", "ia3", {"target_modules": ["word_embeddings"]}, "Embedding.*is not supported"),
    ("llama", "lora", {"target_modules": ["input_layernorm"]}, "LlamaRMSNorm.*is not supported"),
)
"""What PEFT refuses: family, kind of adapter, target and message."""


def build(name: str) -> Any:
    """A model of the family with random weights."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    import transformers

    family = FAMILIES[name]
    config = getattr(transformers, family.config)(**family.kwargs)
    return getattr(transformers, family.auto).from_config(config)


def adapt(model: nn.Module, kind: str, target_modules: Any = (), ffn: tuple[str, ...] = (), **kwargs: Any) -> nn.Module:
    """``model`` with PEFT adapters of ``kind``: lora, dora or ia3."""
    import peft

    if kind == "ia3":
        config: Any = peft.IA3Config(target_modules=list(target_modules), feedforward_modules=list(ffn), **kwargs)
    else:
        config = peft.LoraConfig(r=2, target_modules=list(target_modules), use_dora=kind == "dora", **kwargs)
    return peft.get_peft_model(model, config)


def adapted(name: str, kind: str) -> nn.Module:
    """A model of the family with adapters of ``kind`` on the family's targets."""
    return adapt(build(name), kind, FAMILIES[name].target, FAMILIES[name].ffn)

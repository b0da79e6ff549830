"""A small language model of its own: what the decoder's evidence begins with, made from public prose on one core.

Byte pairs and weights are learned from WikiText-2's test text, Tiny Shakespeare and PubMedQA's abstracts; WikiText-2's
validation text is never trained on, so that what fine-tuning forgets can be measured on it.
"""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader

from apportion.recipes.evidence.model import CACHE
from apportion.recipes.evidence.sources import located
from apportion.recipes.evidence.text import Batch
from apportion.recipes.tasks.module import CausalLM

PROSE = ("wikitext2/test.txt", "tinyshakespeare/input.txt", "pubmedqa/ori_pqal.json")
HELD_OUT = "wikitext2/valid.txt"
END = "<end>"
BLOCK = 256
"""Tokens of a training block."""

CONFIG = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def prose(data: Path, file: str) -> str:
    """The running text of one file of the data folder."""
    path = located(data, file)
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return text
    return "\n".join(" ".join(item["CONTEXTS"]) for item in json.loads(text).values())


def byte_pairs(texts: list[str], size: int) -> Tokenizer:
    """Byte-level byte pairs learned from ``texts``; the first token ends a text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(texts, trainer)
    return made


def blocks(text: str, tokenizer: Tokenizer, most: int | None = None) -> torch.Tensor:
    """Tokens of a text in rows of `BLOCK`, int64, shape (n, 256); the rest is left out.

    Args:
        text: Running text.
        tokenizer: Makes tokens of it.
        most: Rows to take, spread evenly over the text; None for all.
    """
    tokens = torch.tensor([t for line in text.splitlines(keepends=True) for t in tokenizer.encode(line).ids])
    found = tokens[: len(tokens) // BLOCK * BLOCK].view(-1, BLOCK)
    return found if most is None or len(found) <= most else found[torch.arange(most) * len(found) // most]


def held_out(data: Path, tokenizer: Tokenizer, most: int = 96, size: int = 16) -> list[Batch]:
    """Batches of the text that is never trained on."""
    found = blocks(prose(data, HELD_OUT), tokenizer, most)
    return [{"input_ids": some, "labels": some} for some in found.split(size)]


def pretrain(
    data: Path,
    folder: Path,
    steps: int = 900,
    size: int = 16,
    rate: float = 3e-3,
    config: dict[str, Any] | None = None,
) -> Path:
    """Makes tokenizer and model, and writes both with what came out.

    Args:
        data: The data folder.
        folder: Where they go; it appears when it is complete.
        steps: Optimizer steps.
        size: Blocks of a step.
        rate: Learning rate at its highest.
        config: Values that replace those of `CONFIG`.
    """
    settings = CONFIG | (config or {})
    pl.seed_everything(0, verbose=False)
    texts = [prose(data, file) for file in PROSE]
    tokenizer = byte_pairs(texts, int(settings["vocab_size"]))  # type: ignore[call-overload]
    rows = torch.cat([blocks(text, tokenizer) for text in texts])
    draw = torch.Generator().manual_seed(0)
    epochs = -(-steps * size // len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=draw) for _ in range(epochs)])[: steps * size]
    train = [{"input_ids": rows[some], "labels": rows[some]} for some in order.split(size)]
    optimizer = partial(torch.optim.AdamW, lr=rate, weight_decay=0.1, betas=(0.9, 0.95))
    module = CausalLM(config=settings, optimizer=optimizer, schedule="cosine", warmup=0.05)
    trainer = pl.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_steps=steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, DataLoader(train, batch_size=None))  # type: ignore[arg-type]
    found = trainer.validate(module, DataLoader(held_out(data, tokenizer), batch_size=None), verbose=False)[0]  # type: ignore[arg-type]
    fresh = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    fresh.mkdir(parents=True)
    module.model.save_pretrained(fresh)
    tokenizer.save(str(fresh / "tokenizer.json"))
    told = {
        "steps": steps,
        "tokens": int(order.numel()) * BLOCK,
        "distinct_tokens": rows.numel(),
        "held_out": found,
    }
    (fresh / "pretrain.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    shutil.move(fresh, folder)
    return folder


def pretrained(data: Path, cache: Path = CACHE) -> Path:
    """The folder of the pre-trained model, made once."""
    folder = cache / "evidence-decoder"
    return folder if (folder / "model.safetensors").is_file() else pretrain(data, folder)

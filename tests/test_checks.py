"""What would fail silently is an error, or a warning, that says the way out."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from pytorch_lightning.plugins import MixedPrecision
from toys import ManualTask, Net, Task, adamw, fit, moved, trainable, weights
from witness import Witness

from apportion.callbacks import HFT, LISA, RST


def test_non_reentrant_checkpointing_gives_the_weights_of_none() -> None:
    for frozen in (True, False):
        plain, saved = Task(Net()), Task(Net(checkpointing="non-reentrant"))
        driver = LISA(1, 1, train_embeddings=not frozen)
        witness = Witness(driver)
        fit(plain, LISA(1, 1, train_embeddings=not frozen))
        fit(saved, [driver, witness])
        witness.check()
        assert not moved(weights(plain), weights(saved))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # torch's own, easily missed
def test_reentrant_checkpointing_over_frozen_embeddings_is_caught_at_the_first_step() -> None:
    start = Task(Net(checkpointing="reentrant"))
    before = weights(start)
    with pytest.raises(RuntimeError, match=r"selected net\.layers\.\d, but none of its .* use_reentrant=False"):
        fit(start, LISA(1, 1, train_embeddings=False))
    assert not moved(before, weights(start))
    assert all(p.requires_grad for p in start.parameters())


def test_reentrant_checkpointing_over_trained_embeddings_is_right() -> None:
    plain, saved = Task(Net()), Task(Net(checkpointing="reentrant"))
    fit(plain, LISA(1, 1))
    fit(saved, LISA(1, 1))
    assert not moved(weights(plain), weights(saved))


def llama(reentrant: bool | None, inputs: bool = True) -> Any:
    """A tiny Llama; transformers makes the layers' input require a gradient when it switches checkpointing on."""

    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=13,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if not inputs:
        model.disable_input_require_grads()
    return model


class Causal(Task):  # type: ignore[misc, valid-type]
    """A transformers model."""

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.net(input_ids=batch, labels=batch).loss
        return loss


def test_transformers_reentrant_checkpointing_over_frozen_embeddings_is_refused() -> None:
    with pytest.raises(ValueError, match=r"checkpoints activations reentrantly .*'use_reentrant': False"):
        fit(Causal(llama(True, inputs=False)), LISA(1, 1, train_embeddings=False))


@pytest.mark.parametrize(
    ("reentrant", "inputs", "embeddings"), [(True, True, False), (True, False, True), (False, False, False)]
)
def test_transformers_checkpointing_that_is_right_gives_the_weights_of_none(
    reentrant: bool, inputs: bool, embeddings: bool
) -> None:
    plain, saved = Causal(llama(None)), Causal(llama(reentrant, inputs))
    fit(plain, LISA(1, 1, train_embeddings=embeddings), steps=4)
    driver = LISA(1, 1, train_embeddings=embeddings)
    witness = Witness(driver)
    fit(saved, [driver, witness], steps=4)
    witness.check()
    assert not moved(weights(plain), weights(saved))


def test_running_statistics_are_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"running statistics of batch norms, such as net\.layers\.0\.batch_norm"):
        fit(Task(Net(batch_norm=True)), LISA(1, 1))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit(Task(Net()), LISA(1, 1))
    assert not [w for w in seen if "running statistics" in str(w.message)]


def test_an_optimizer_with_nothing_to_train_is_refused_under_a_gradient_scaler() -> None:
    def per_layer(module: Any) -> list[torch.optim.Optimizer]:
        layers = [adamw(layer.parameters()) for layer in module.net.layers]
        held = {id(p) for layer in module.net.layers for p in layer.parameters()}
        return [*layers, adamw([p for p in module.parameters() if id(p) not in held])]

    precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="selects nothing that this `AdamW` holds"):
        fit(ManualTask(optimizer=per_layer), LISA(1, 1), plugins=[precision])
    fit(ManualTask(optimizer=per_layer), LISA(1, 1), steps=10)  # without a scaler it steps on nothing


def test_several_optimizers_are_each_checked_for_gradients() -> None:
    class Shallow(Net):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.lm_head(self.norm(self.layers[0](self.embed_tokens(ids))))

    def halves(module: Any) -> list[torch.optim.Optimizer]:
        return [adamw(trainable(module)[::2]), adamw(trainable(module)[1::2])]

    with pytest.raises(RuntimeError, match=r"selected net\.layers\.1, but none of its"):
        fit(ManualTask(Shallow(), halves), LISA(4))


def test_a_model_without_layers_is_refused() -> None:
    class Bare(Task):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__(torch.nn.Linear(2, 2), lambda m: adamw(m.parameters()))

    for method in (LISA(1), RST(1), HFT()):
        with pytest.raises(ValueError, match="`"):
            fit(Bare(), method)

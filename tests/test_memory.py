"""The live tracker: what it counts, as what, and that an allocator agrees."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from apportion import ledger, storages
from apportion.callbacks import IST, LISA
from apportion.callbacks.memory import MemoryMonitor
from apportion.memory import Parts, Tracker
from apportion.optim import Selective


def llama(layers: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1000,
        max_position_embeddings=256,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def lora(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model, LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])
    )


def size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, autocast: bool = False) -> None:
    for _ in range(steps):
        tokens = torch.randint(0, 1000, (2, 64))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def allocator_peak(recorded: Any) -> int:
    """The most that the CPU allocator says to have given out while the profiler watched."""
    counts, events = [], list(recorded.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            fields = event.extra_fields
            counts.append((event.start_time_ns, fields.total_allocated, fields.alloc_size))
    _, first, its_own = min(counts)
    return max(total for _, total, _ in counts) - (first - its_own)


def full(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model))


def lisa(model: nn.Module) -> torch.optim.Optimizer:
    return Selective(full(model), model, LISA(active_layers=1, interval=1))


def ist(model: nn.Module) -> torch.optim.Optimizer:
    tokens = torch.randint(0, 1000, (2, 64))
    method = IST(active=0.25, probe_interval=2)
    return Selective(full(model), model, method, probe=lambda: model(input_ids=tokens, labels=tokens).loss)


@pytest.mark.parametrize(
    ("method", "checkpointing", "autocast"),
    [(full, False, False), (full, True, True), (lisa, True, False), (lisa, False, True), (ist, False, False)],
)
def test_the_peak_is_what_the_allocator_says(method: Any, checkpointing: bool, autocast: bool) -> None:
    gc.collect()  # what an earlier test has left would be freed under the profiler, and lower its count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        model = lora(llama()) if method is ist else llama()
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with Tracker(model) as tracker:
            train(model, method(model), 3, autocast)
    held = tracker.peak.total + tracker.peak.offloaded  # on the CPU what is offloaded stays in the same memory
    assert held == pytest.approx(allocator_peak(recorded), rel=0.02)


def test_what_is_held_between_steps_is_counted_to_the_byte() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 8))
    model.register_buffer("scale", torch.ones(100))
    adamw = torch.optim.AdamW(model.parameters())
    weights = size(model.parameters())
    with Tracker(model) as tracker:
        model(torch.ones(4, 32)).sum().backward()
        assert tracker.now.gradients == weights
        adamw.step()
        adamw.zero_grad()
    assert tracker.now == Parts(weights=weights + 400, optimizer=2 * weights + 4 * 4)


def test_state_and_gradients_from_before_are_counted_once() -> None:
    model = nn.Linear(16, 16)
    adamw = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 16)).sum().backward()
    adamw.step()
    tracker = Tracker(model, adamw)
    assert tracker.now == Parts(weights=1088, gradients=1088, optimizer=2 * 1088 + 8)


def test_tied_weights_and_views_count_once() -> None:
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    model[1].weight = model[0].weight
    with Tracker(model) as tracker:
        made = torch.ones(1000)
        views = [made[i:] for i in range(5)] + [made.view(10, 100), made.detach()]
        assert tracker.now == Parts(weights=1024, temporaries=4000)
        del made, views
        assert tracker.now == Parts(weights=1024)


def test_what_was_there_before_and_is_only_looked_at_is_not_of_the_run() -> None:
    data = torch.ones(1000, 8)
    with Tracker(nn.Linear(8, 8, bias=False)) as tracker:
        row = data[3]
        assert tracker.now == Parts(weights=256)
        batch = torch.stack([row, data[4]])
        assert tracker.now == Parts(weights=256, temporaries=64)
    assert batch.numel() == 16


def test_activations_are_what_backward_finds() -> None:
    model = nn.Sequential(nn.Linear(8, 100, bias=False), nn.Sigmoid(), nn.Linear(100, 200, bias=False), nn.Sigmoid())
    with Tracker(model) as tracker:
        model(torch.ones(10, 8)).sum().backward()
    # the input, two results of Sigmoid, the sum and its gradient; what Linear gave is of no use to Sigmoid's backward
    assert tracker.highest.activations == 4 * (10 * 8 + 10 * 100 + 10 * 200 + 1 + 1)


def test_what_checkpointing_recomputes_is_an_activation_too() -> None:
    def peaks(recompute: bool) -> Parts:
        block = nn.Sequential(nn.Linear(50, 50, bias=False), nn.Sigmoid(), nn.Linear(50, 50, bias=False), nn.Sigmoid())
        layers = nn.ModuleList([block for _ in range(8)])
        with Tracker(layers) as tracker:
            hidden = torch.ones(100, 50)
            for layer in layers:
                options = {"use_reentrant": False, "preserve_rng_state": False}
                hidden = checkpoint(layer, hidden, **options) if recompute else layer(hidden)
            hidden.sum().backward()
        return tracker.highest

    row = 4 * 100 * 50
    assert peaks(False).activations == pytest.approx((1 + 8 * 2) * row, abs=8)
    # the inputs of eight blocks and the output; and, of the one that is recomputed, all but its first product
    assert peaks(True).activations == pytest.approx((1 + 8 + 3) * row, abs=8)


def test_without_backward_everything_is_temporary() -> None:
    model = nn.Sequential(nn.Linear(8, 100), nn.Sigmoid(), nn.Linear(100, 200))
    with Tracker(model) as tracker, torch.no_grad():
        model(torch.ones(10, 8))
    assert tracker.highest.activations == 0
    assert tracker.peak.temporaries >= 4 * (10 * 100 + 10 * 200)


def test_an_average_of_the_weights_is_no_activation() -> None:
    model = nn.Linear(64, 64, bias=False)
    sgd = torch.optim.SGD(model.parameters())
    with Tracker(model) as tracker:
        average = [p.detach().clone() for p in model.parameters()]
        for _ in range(4):
            model(torch.ones(2, 64)).sum().backward()
            sgd.step()
            sgd.zero_grad()
        assert tracker.now.temporaries == size(average)
        assert tracker.now.activations == 0


def test_masters_are_optimizer_state() -> None:
    model = llama(2).to(torch.bfloat16)
    optimizer = Selective(full(model), model, LISA(active_layers=1, master="fp32"))
    with Tracker(model) as tracker:
        train(model, optimizer, 2)
    selected = trainable(model)
    assert tracker.now.weights == size(model.parameters()) + size(model.buffers())
    assert tracker.now.optimizer == sum(3 * 4 * p.numel() + 4 for p in selected)


def test_offloaded_state_is_not_on_the_device() -> None:
    model = lora(llama())
    total = sum(2 * 4 * p.numel() + 4 for p in trainable(model))
    optimizer = Selective(full(model), model, IST(active=1, rate=0.0, probe_interval=1000), probe=lambda: 0.0)
    with Tracker(model) as tracker:
        train(model, optimizer, 20)
    seen = optimizer.selection.history.masks.any(0)
    assert seen.all()
    assert tracker.now.optimizer == total // 4
    assert tracker.now.offloaded == total - total // 4
    assert tracker.highest.optimizer == total // 4
    assert tracker.peak.total == sum(v for k, v in tracker.peak.as_dict().items() if k not in ("peak", "offloaded"))


def test_an_early_sum_of_the_log_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[Parts, Parts, Parts]:
        model = llama(2)
        with Tracker(model) as tracker:
            train(model, full(model), 2)
        return tracker.now, Parts(tracker.peak.total), Parts(tracker.highest.weights)

    once = run()
    monkeypatch.setattr(storages, "_FOLD", 10)
    assert run() == once


def test_the_timeline_reaches_the_peak_and_marks_split_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(2)
    with Tracker(model) as tracker:
        optimizer = full(model)
        peaks = []
        for step in range(3):
            train(model, optimizer, 1)
            peaks.append(tracker.mark(f"step {step}"))
    assert max(point.parts.total for point in tracker.timeline) == tracker.peak.total == max(p.total for p in peaks)
    assert peaks[0].total < peaks[1].total == peaks[2].total  # the first step had no state before its end
    assert tracker.mark("rest") == tracker.now
    assert tracker.now.total < peaks[2].total
    assert [label for _, label in tracker.marks] == ["step 0", "step 1", "step 2", "rest"]
    events = [point.event for point in tracker.timeline]
    assert events == sorted(events)
    assert all(point.parts.total >= 0 and min(vars(point.parts).values()) >= 0 for point in tracker.timeline)
    assert len(events) < 3 * 4 * ledger._BINS


def test_the_tracker_leaves_nothing_behind() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), Tracker(model) as tracker:
        model(torch.ones(1, 3))
    assert not _global_optimizer_pre_hooks
    assert not _global_optimizer_post_hooks
    assert not tracker.entered
    before = tracker.now
    kept = torch.ones(1000)
    assert tracker.now == before
    assert kept.numel() == 1000


def test_watch_names_what_it_takes() -> None:
    with pytest.raises(TypeError, match=r"`Tracker.watch\(Tensor\)` takes a module or an optimizer"):
        Tracker().watch(torch.ones(1))  # type: ignore[arg-type]


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_a_trainer_runs_under_the_tracker(package: str) -> None:
    lightning = pytest.importorskip(package)
    module = fitted(lightning)
    with Tracker(module) as tracker:
        trainer(lightning, []).fit(module, batches())
    weights = size(module.parameters())
    assert tracker.highest.weights == weights
    assert tracker.highest.optimizer == 2 * weights + 4 * 4
    assert tracker.highest.gradients == weights
    assert tracker.highest.activations > 0


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_the_monitor_logs_every_step_by_part(package: str) -> None:
    lightning = pytest.importorskip(package)
    module, monitor = fitted(lightning), MemoryMonitor()
    run = trainer(lightning, [monitor])
    run.fit(module, batches())
    weights = size(module.parameters())
    assert run.callback_metrics["memory/weights"] == pytest.approx(weights / 2**20)
    assert run.callback_metrics["memory/optimizer"] == pytest.approx((2 * weights + 16) / 2**20)
    assert run.callback_metrics["memory/peak"] == pytest.approx(monitor.tracker.peak.total / 2**20, rel=1e-3)
    assert [label for _, label in monitor.tracker.marks] == [f"step {i}" for i in range(1, 7)]
    assert not monitor.tracker.entered


def test_the_monitor_stops_after_its_steps_and_after_an_error() -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    module, monitor = fitted(lightning), MemoryMonitor(steps=2)
    trainer(lightning, [monitor]).fit(module, batches())
    assert [label for _, label in monitor.tracker.marks] == ["step 1", "step 2"]
    module, monitor = fitted(lightning), MemoryMonitor()
    module.fail_at = 3
    with pytest.raises(RuntimeError, match="at batch 3"):
        trainer(lightning, [monitor]).fit(module, batches())
    assert not monitor.tracker.entered
    with pytest.raises(ValueError, match=r"`MemoryMonitor\(steps=0\)` must be at least 1"):
        MemoryMonitor(steps=0)


def batches() -> Any:
    return torch.utils.data.DataLoader(torch.randn(24, 32), batch_size=4)


def trainer(lightning: Any, callbacks: list[Any]) -> Any:
    return lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def fitted(lightning: Any) -> Any:
    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(32, 64), nn.Sigmoid(), nn.Linear(64, 1))
            self.fail_at = -1

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == self.fail_at:
                raise RuntimeError(f"at batch {batch_idx}")
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    return Module()

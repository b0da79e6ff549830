"""AdaLoRA chooses what the released code and PEFT's allocator choose, at every step; and the figures of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn

from apportion.callbacks import AdaLoRA
from apportion.optim import Selective
from apportion.orthogonality import Orthogonality, penalty
from apportion.rank_budgets import Decay
from apportion.rank_units import Ranks
from apportion.rules import TopK
from apportion.sensitivity import Sensitivity
from apportion.types import Draw

TRACE: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "adalora_official.json").read_text())


def adapted(model: nn.Module, rank: int, **options: Any) -> Any:
    """``model`` with AdaLoRA adapters of ``rank`` on all its linear layers."""
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    config = AdaLoraConfig(init_r=rank, target_modules=names, **{"target_r": 1, "total_step": 1000, **options})
    return get_peft_model(model, config)


def values(model: nn.Module) -> Tensor:
    """The singular values of all adapters in model order, as state dicts have them."""
    return torch.cat([v.flatten() for k, v in model.state_dict().items() if ".lora_E." in k])


# The trace of the released code
# --------------------------------------------------------------------------------------------------------------------


class Replay(nn.Module):
    """The three matrices of the trace."""

    def __init__(self) -> None:
        super().__init__()
        for name in "qvo":
            a, b = (torch.tensor(TRACE["initial"][f"{name}.lora_{x}"]) for x in "AB")
            self.add_module(name, nn.Linear(a.shape[1], b.shape[0], bias=False))


@pytest.mark.parametrize("shrink", [True, False])
def test_every_step_of_the_released_code_is_repeated(shrink: bool) -> None:
    c = TRACE["config"]
    model = adapted(Replay(), c["init_rank"])
    params = dict(model.named_parameters())
    named = {k: params[f"base_model.model.{k}.default"] for k in TRACE["initial"]}
    for key, p in named.items():
        p.data = torch.tensor(TRACE["initial"][key])
    method = AdaLoRA(
        target_rank=c["target_rank"],
        warmup=c["init_warmup"],
        final=c["final_warmup"],
        every=c["mask_interval"],
        beta1=c["beta1"],
        beta2=c["beta2"],
        orthogonality=0.0,
        shrink=shrink,
    )
    optimizer = Selective(
        torch.optim.SGD(named.values(), lr=c["lr"]), model, method, total_steps=c["total_step"], micro_batches=None
    )
    masked = []
    for step in TRACE["steps"]:
        parts = {part.adapter.module: part for part in optimizer.owner.opened[optimizer._key].shrunk}
        for key, p in named.items():
            grad = torch.tensor(step["grads"][key])
            part = parts.get(model.get_submodule("base_model.model." + key.split(".")[0]))
            p.grad = grad if part is None else part.cut(grad, 1 if "lora_B" in key else 0)
        before = optimizer.selection.count
        optimizer.step()
        assert int(method.slots.budget.at(step["t"], c["total_step"], 12, 3)) == step["budget"]
        expected = torch.cat([torch.tensor(step["E_after"][f"{name}.lora_E"]).flatten() for name in "qvo"])
        torch.testing.assert_close(values(model), expected, rtol=2e-6, atol=1e-7)
        assert torch.equal(values(model) != 0, expected != 0)
        if step["masked"]:
            masked.append(step["t"])
            assert optimizer.selection.mask is not None
            assert torch.equal(optimizer.selection.mask, expected != 0)
            assert int(optimizer.selection.mask.sum()) == step["budget"]
        assert (optimizer.selection.count > before) == (step["masked"] and step["t"] <= 18)
    assert masked == [6, 9, 12, 15, 18, *range(19, 25)]
    optimizer.close()


# PEFT's allocator
# --------------------------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Three layers of different widths and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.mid(torch.tanh(self.up(x)))))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(16, 6, generator=generator)
    return x, x[:, :3] - x[:, 3:].square()


@pytest.mark.parametrize(("every", "warmup", "final"), [(1, 5, 10), (3, 4, 9), (7, 0, 3)])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_ranks_and_weights_follow_peft_over_a_whole_schedule(
    every: int, warmup: int, final: int, weight: float
) -> None:
    total, schedule = 30, {"tinit": warmup, "tfinal": final, "deltaT": every}
    torch.manual_seed(3)
    theirs = adapted(Stack(), 6, target_r=2, total_step=total, orth_reg_weight=weight, **schedule)
    torch.manual_seed(3)
    ours = adapted(Stack(), 6)
    assert torch.equal(values(theirs), values(ours))
    method = AdaLoRA(2, warmup=warmup, final=final, every=every, orthogonality=weight)
    reference = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.1)
    base = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.1)
    optimizer = Selective(base, ours, method, total_steps=total)
    for t in range(1, total + 1):
        x, y = batch(t)
        for model in (theirs, ours):
            loss = (model(x) - y).square().mean()
            if model is theirs and weight:
                loss = loss + weight * peft_penalty(theirs)
            loss.backward()
        reference.step()
        theirs.base_model.update_and_allocate(t)
        reference.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
        kept, expected = values(ours), values(theirs)
        assert torch.equal(kept != 0, expected != 0), t
        torch.testing.assert_close(kept, expected, rtol=1e-3, atol=1e-4)
        x, _ = batch(0)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4)
    assert int((values(ours) != 0).sum()) == 6
    pattern = theirs.peft_config["default"].rank_pattern
    assert optimizer.selection.mask is not None
    assert optimizer.selection.mask.tolist() == [kept for row in pattern.values() for kept in row]
    optimizer.close()


def peft_penalty(model: nn.Module) -> Tensor:
    """What PEFT's forward pass adds for models whose outputs hold a loss, before its weight."""
    norms = []
    for name, p in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            gram = p @ p.T if ".lora_A." in name else p.T @ p
            norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram))))
    return torch.stack(norms).mean()


# Figures
# --------------------------------------------------------------------------------------------------------------------


def test_the_schedule_is_that_of_both_codes() -> None:
    small = Decay(48, warmup=10, final=20)
    expected = {0: 144, 10: 144, 11: 138, 15: 117, 20: 97, 22: 90, 35: 60, 47: 49, 59: 48, 60: 48, 79: 48}
    assert {t: small.at(t, 80, 144) for t in expected} == expected
    large = Decay(576, warmup=8000, final=50000)
    expected = {8000: 864, 8001: 863, 14975: 697, 21950: 612, 28925: 580, 35900: 576, 40000: 576}
    assert {t: large.at(t, 85900, 864) for t in expected} == expected
    assert Decay(mean_rank=8, warmup=8000, final=50000).at(14975, 85900, 864, matrices=72) == 697
    for budget, total, n in ((small, 80, 144), (large, 85900, 864)):
        amounts = [budget.at(t, total, n) for t in range(0, total + 1, max(1, total // 800))]
        assert amounts == sorted(amounts, reverse=True)
    model = adapted(Stack(), 48)
    theirs = AdaLoraConfig(init_r=48, target_r=16, tinit=10, tfinal=20, deltaT=1, total_step=80)
    allocator = type(model.base_model.rankallocator)(model, theirs, "default")
    assert [allocator.budget_schedule(t)[0] for t in range(81)] == [small.at(t, 80, 144) for t in range(81)]


def bound_of(*shapes: tuple[int, int, int]) -> Any:
    """Ranks of PEFT's adapters on matrices of (inputs, outputs, rank)."""
    model = nn.ModuleDict({f"m{i}": nn.Linear(d, o, bias=False) for i, (d, o, _) in enumerate(shapes)})
    return Ranks().bind(adapted(model, shapes[0][2]))


def scored(sensitivities: list[dict[str, Tensor]], bound: Any, steps: int = 1) -> Tensor:
    """Scores when each adapter's tensors have these sensitivities at every step: weights of 1, gradients of them."""
    score = Sensitivity()
    state = score.init(bound)
    with torch.no_grad():
        for _ in range(steps):
            for part, wanted in zip(bound.adapters, sensitivities, strict=True):
                for p, key in ((part.a, "a"), (part.e, "e"), (part.b, "b")):
                    p.fill_(1.0)
                    p.grad = wanted[key].view_as(p).clone()
            score.update(state, bound)
    return score.scores(state, bound)


@pytest.mark.parametrize(
    ("sensitivities", "expected"),
    [
        ([1, 1, 1], [(0.15, 0.1275, 0.019125), (0.2775, 0.21675, 0.060148), (0.385875, 0.276356, 0.106639)]),
        ([1, 0, 2], [(None, None, 0.019125), (None, None, 0.016256), (None, None, 0.141755)]),
    ],
)
def test_the_averages_start_at_zero_and_are_not_corrected(sensitivities: list[int], expected: Any) -> None:
    bound = bound_of((1, 1, 1))
    score = Sensitivity()
    state = score.init(bound)
    value = bound.adapters[0].e
    for sensitivity, (mean, doubt, s) in zip(sensitivities, expected, strict=True):
        for p, _ in bound.adapters[0].tensors():
            p.data.fill_(-1.0)
            p.grad = torch.full_like(p, float(sensitivity) if p is value else 0.0)
        score.update(state, bound)
        if mean is not None:
            place = next(i for i, stack in enumerate(bound.stacks) for p in stack.params if p is value)
            index = next(j for j, p in enumerate(bound.stacks[place].params) if p is value)
            assert state[f"mean.{place}"][index].item() == pytest.approx(mean, abs=1e-6)
            assert state[f"doubt.{place}"][index].item() == pytest.approx(doubt, abs=1e-6)
        assert float(score.scores(state, bound)) == pytest.approx(s, abs=1e-6)


def test_a_steady_sensitivity_loses_in_the_end() -> None:
    ones = {"e": torch.ones(1), "a": torch.zeros(1), "b": torch.zeros(1)}
    amounts = [float(scored([ones], bound_of((1, 1, 1)), steps)) for steps in (9, 50)]
    assert amounts[0] == pytest.approx(0.24026, abs=1e-5)
    assert amounts[1] == pytest.approx(0.0022, abs=1e-4)


WORKED = [
    {"e": [0.4, 0.1], "a": [[0.2, 0.4], [0.1, 0.1]], "b": [[0.3, 0.0], [0.1, 0.2]]},
    {"e": [0.3, 0.2], "a": [[0.1, 0.1], [0.5, 0.1]], "b": [[0.1, 0.3], [0.1, 0.1]]},
]


def worked(bound: Any) -> Tensor:
    return scored([{k: torch.tensor(v) for k, v in one.items()} for one in WORKED], bound)


def test_two_matrices_by_hand() -> None:
    bound = bound_of((2, 2, 2), (2, 2, 2))
    scores = worked(bound)
    expected = torch.tensor([0.00592875, 0.000765, 0.00210375, 0.0042075], dtype=torch.float64)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-8)
    survivors = {k: TopK().select(Draw(scores, k, bound, torch.Generator()))[0].tolist() for k in (3, 2, 1)}
    assert survivors[3] == [True, False, True, True]
    assert survivors[2] == [True, False, False, True]
    assert survivors[1] == [True, False, False, False]  # the second matrix is left with none


def test_exactly_the_budget_is_in_at_ties_where_a_threshold_puts_out_too_many() -> None:
    bound = bound_of((2, 2, 6))
    scores = torch.tensor([0.5, 0.5, 0.5, 0.1, 0.9, 0.2], dtype=torch.float64)
    mask, _ = TopK().select(Draw(scores, 3, bound, torch.Generator()))
    assert mask.tolist() == [True, True, False, False, True, False]
    assert int((scores > scores.kthvalue(3)[0]).sum()) == 1  # PEFT's way


def test_common_factors_change_no_choice() -> None:
    bound = bound_of((2, 2, 2), (2, 2, 2))
    plain = worked(bound)
    doubled = scored([{k: 8 * torch.tensor(v) for k, v in one.items()} for one in WORKED], bound)
    torch.testing.assert_close(doubled, 64 * plain, rtol=1e-6, atol=0)


def test_the_width_of_a_layer_plays_no_part() -> None:
    bound = bound_of((4, 400, 2), (400, 4, 2))
    even = [
        {"e": torch.full((2,), 0.3), "a": torch.full((2, w), 0.2), "b": torch.full((v, 2), 0.1)}
        for w, v in ((4, 400), (400, 4))
    ]
    scores = scored(even, bound, steps=3)
    torch.testing.assert_close(scores, scores[:1].expand(4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_half_precision_weights_do_not_vanish(dtype: torch.dtype) -> None:
    bound = bound_of((16, 16, 4))
    score = Sensitivity()
    state = score.init(bound)
    torch.manual_seed(0)
    for p, _ in bound.adapters[0].tensors():
        p.data = (0.02 * torch.randn(p.shape)).to(dtype)
        p.grad = (1e-4 * torch.randn(p.shape)).to(dtype)
    score.update(state, bound)
    assert all(v.dtype == torch.float32 for v in state.values())
    scores = score.scores(state, bound)
    assert bool((scores > 0).all())
    assert len(scores.unique()) == 4


@pytest.mark.parametrize(("rank", "width", "expected"), [(12, 64, 3.376), (12, 768, 2.404), (12, 4096, 2.235)])
def test_the_penalty_of_fresh_factors(rank: int, width: int, expected: float) -> None:
    torch.manual_seed(0)
    rows = [0.02 * torch.randn(rank, width) for _ in range(40)]
    value, _ = penalty(rows, 0, "norms", len(rows))
    assert float(value) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("form", ["norms", "squares"])
def test_the_gradient_of_the_penalty_is_that_of_autograd(form: str) -> None:
    torch.manual_seed(0)
    model = adapted(Stack(), 4)
    bound = Ranks().bind(model)
    for p in bound.covered():
        p[1].grad = torch.full_like(p[1], 0.5)
    value = Orthogonality(0.3, form).add(bound.adapters, scale=4.0)
    grams = [
        p @ p.T if ".lora_A." in n else p.T @ p
        for n, p in model.named_parameters()
        if ".lora_A." in n or ".lora_B." in n
    ]
    norms = torch.stack([torch.linalg.matrix_norm(g - torch.eye(4)) for g in grams])
    reference = 0.3 * (norms.mean() if form == "norms" else norms.square().sum())
    assert float(value) == pytest.approx(reference.item(), rel=1e-5)
    factors = [p for part in bound.adapters for p in (part.a, part.b)]
    for p, g in zip(factors, torch.autograd.grad(reference, factors), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, 0.5 + 4.0 * g, rtol=1e-4, atol=1e-5)
    assert all(bool((part.e.grad == 0.5).all()) for part in bound.adapters)


def test_the_two_forms_differ_as_the_papers_settings_say() -> None:
    torch.manual_seed(0)
    rows = [0.02 * torch.randn(12, 768) for _ in range(144)]
    squares, norms = (float(penalty(rows, 0, form, 144)[0]) for form in ("squares", "norms"))
    assert squares / norms == pytest.approx(144 * 2.4, rel=0.05)

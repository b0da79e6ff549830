"""Ranks handed out before training: spectra by hand, exact budgets, PEFT's own EVA, and what PEFT makes of it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.tuners.lora.config import EvaConfig
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor, nn
from toys import Net, moved, tokens, weights
from workers import ranks

from apportion.allocation import allocate, hand_out, with_ranks
from apportion.spectra import gradient, variance, weight


class Chain(nn.Module):
    """Maps one after another: no two of them are given the same tensor."""

    def __init__(self, widths: tuple[int, ...] = (12, 16, 12, 8)) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.maps = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(widths))
        with torch.no_grad():
            self.maps[1].weight.mul_(6.0)  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        for one in self.maps:
            x = torch.tanh(one(x))
        return x


def config(**options: Any) -> Any:
    given = {"r": 3, "lora_alpha": 6, "target_modules": ["0", "1", "2"], **options}
    return LoraConfig(**given)


def data(rows: int = 60, width: int = 12, batches: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    scales = torch.tensor([2.0, 0.5, *(0.1,) * (width - 2)])
    return [torch.randn(rows, width, generator=generator) * scales for _ in range(batches)]


# Handing out
# --------------------------------------------------------------------------------------------------------------------


@given(
    rows=st.lists(st.lists(st.floats(0, 9, width=16), min_size=1, max_size=6), min_size=1, max_size=6), data=st.data()
)
def test_the_budget_is_exact_and_no_value_left_out_is_larger(rows: list[list[float]], data: st.DataObject) -> None:
    values = {str(i): torch.tensor(sorted(row, reverse=True)) for i, row in enumerate(rows)}
    budget = data.draw(st.integers(1, sum(map(len, rows))))
    got = hand_out(values, budget)
    assert sum(got.values()) == budget
    taken = [float(v) for name, row in values.items() for v in row[: got[name]]]
    left = [float(v) for name, row in values.items() for v in row[got[name] :]]
    assert not left or min(taken) >= max(left)


def test_ties_go_to_the_earlier_matrix() -> None:
    assert hand_out({k: torch.full((3,), 0.5) for k in "abc"}, 4) == {"a": 3, "b": 1, "c": 0}


def test_what_cannot_be_handed_out_is_refused() -> None:
    values = {"a": torch.ones(2), "b": torch.ones(1)}
    for budget in (0, 4):
        with pytest.raises(ValueError, match=rf"`hand_out\(budget={budget}\)` must lie in \[1, 3\]"):
            hand_out(values, budget)
    with pytest.raises(ValueError, match="a value of b that is not finite"):
        hand_out({"a": torch.ones(2), "b": torch.tensor([torch.nan])}, 1)


# Spectra
# --------------------------------------------------------------------------------------------------------------------


def test_variance_is_the_share_along_principal_directions() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    batch = torch.tensor([[3.0, 1.0], [3.0, -1.0], [-3.0, 1.0], [-3.0, -1.0]]) + 7.0  # variances 9 and 1
    got = variance(model, {"0": model[0]}, {"0": 2}, model, [batch, batch])
    torch.testing.assert_close(got["0"], torch.tensor([0.9, 0.1], dtype=torch.float64), atol=1e-6, rtol=0)


def test_tokens_that_are_left_out_do_not_count() -> None:
    model: Any = nn.Linear(2, 2)
    kept = torch.tensor([[3.0, 1.0], [3.0, -1.0], [-3.0, 1.0], [-3.0, -1.0]])
    shown = torch.cat([kept, torch.tensor([[50.0, 9.0], [9.0, 90.0]])]).view(2, 3, 2)
    mask, labels = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    mask[1, 2], labels[1, 1] = 0, -100
    batch = {"x": shown, "attention_mask": mask, "labels": labels}
    got = variance(model, {"": model}, {"": 2}, lambda batch: model(batch["x"]), [batch])
    torch.testing.assert_close(got[""], torch.tensor([0.9, 0.1], dtype=torch.float64), atol=1e-6, rtol=0)


def test_gradient_is_what_a_step_of_few_ranks_gains() -> None:
    # L = 2 y_1 at x = (1, 0) and 4 y_2 at x = (0, 1): mean gradient diag(1, 2)
    model = nn.Linear(2, 2, bias=False)
    batches = [
        (torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0])),
        (torch.tensor([0.0, 1.0]), torch.tensor([0.0, 4.0])),
    ]
    run = lambda batch: (model(batch[0]) * batch[1]).sum()  # noqa: E731
    assert gradient(model, {"": model}, {"": 2}, run, batches)[""].tolist() == [4.0, 1.0]
    lr, before = 1e-3, sum(float(run(b)) for b in batches) / 2
    with torch.no_grad():
        model.weight[1, 1] -= lr * 2.0
    assert before - sum(float(run(b)) for b in batches) / 2 == pytest.approx(lr * 4.0, rel=1e-3)


def test_weight_is_the_share_of_each_direction() -> None:
    linear = nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.0, 3.0, 0.0], [1.0, 0.0, 0.0]]))
    torch.testing.assert_close(weight({"a": linear}, {"a": 1})["a"], torch.tensor([0.9], dtype=torch.float64))


# The whole
# --------------------------------------------------------------------------------------------------------------------


def eva(model: nn.Module, lora: Any, batches: list[Any], run: Any, rho: float = 2.0) -> dict[str, int]:
    """The ranks of PEFT's EVA, every batch gone through once: components count as converged at any cosine."""
    lora.eva_config = EvaConfig(rho=rho, tau=0.0)
    options: dict[str, Any] = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
    found = get_eva_state_dict(model, batches, lora, forward_fn=run, show_progress_bar=False, **options)
    return {name: len(rows) for name, rows in found.items()}


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_ranks_are_those_of_pefts_eva(rank: int, rho: float) -> None:
    model, batches = Chain(), data()
    theirs = eva(model, config(r=rank), batches, lambda model, batch: model(batch), rho)
    ours = allocate(model, config(r=rank), batches, cap=rho, loss_fn=model)
    assert {f"maps.{i}": ours.rank_pattern.get(rf"^maps\.{i}", 0) for i in range(3)} == theirs
    assert rank < 3 or rho == 1.0 or len(set(theirs.values())) > 1


def test_matrices_that_share_their_input_get_what_pefts_eva_gives_them_together() -> None:
    model: Any = Net(dropout=0.0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    batches = [tokens(6, seed=s) for s in (1, 2)]
    theirs = eva(model, LoraConfig(r=2, target_modules=lora.target_modules), batches, lambda m, b: m(b))
    ours = allocate(model, lora, batches, loss_fn=model)
    got = {name: ours.rank_pattern.get("^" + name.replace(".", r"\."), 0) for name in theirs}
    assert sum(got.values()) == sum(theirs.values()) == 32

    def grouped(found: Mapping[str, int]) -> list[Any]:
        layers = [f"layers.{i}.self_attn." for i in range(4)]
        return [(sum(found[at + k] for k in ("q_proj", "k_proj", "v_proj")), found[at + "o_proj"]) for at in layers]

    # Equal values of q, k and v at the edge of the budget may go to one layer's or the next one's.
    assert sum(abs(a - c) + abs(b - d) for (a, b), (c, d) in zip(grouped(got), grouped(theirs), strict=True)) <= 2


@pytest.mark.parametrize("score", ["variance", "gradient", "weight"])
@pytest.mark.parametrize("budget", [1, 5, 9, 18])
def test_peft_builds_what_was_handed_out_with_the_scales_of_the_configuration(score: str, budget: int) -> None:
    model: Any = Chain((12, 16, 12, 12))
    before = weights(model)
    lora = config(lora_alpha=5, alpha_pattern={"1": 12})
    options: dict[str, Any] = {"loss_fn": lambda x: model(x).square().mean()}
    made = allocate(model, lora, data(), score=score, budget=budget, **options)
    again = allocate(model, lora, data(), score=score, budget=budget, **options)
    assert made.to_dict() == again.to_dict()
    assert lora.to_dict() == config(lora_alpha=5, alpha_pattern={"1": 12}).to_dict()
    assert not moved(before, weights(model))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model.training
    adapted: Any = get_peft_model(model, made)
    layers = {name: m for name, m in adapted.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}
    assert sum(m.r["default"] for m in layers.values()) == budget
    for name, m in layers.items():
        assert m.scaling["default"] == pytest.approx((12 if name.endswith("maps.1") else 5) / 3)
        assert m.lora_A["default"].weight.shape[0] == m.r["default"] <= 6
    assert {name.rpartition("model.")[2] for name in layers} == {
        k[1:].replace("\\", "") for k, r in made.rank_pattern.items() if r
    }


def test_the_scale_of_rank_stabilized_adapters_stays_too() -> None:
    made = with_ranks(config(r=4, lora_alpha=8, use_rslora=True), {"maps.0": 1, "maps.1": 9, "maps.2": 0})
    assert made.alpha_pattern == {r"^maps\.0": 4.0, r"^maps\.1": 12.0}
    adapted: Any = get_peft_model(Chain(), made)  # type: ignore[arg-type]
    scales = [m.scaling["default"] for m in adapted.modules() if hasattr(m, "base_layer")]
    assert scales == pytest.approx([4.0, 4.0])


def test_names_that_end_alike_are_kept_apart() -> None:
    for first, second in ((2, 3), (0, 3), (2, 0)):
        inner = nn.ModuleDict({"q": nn.Linear(4, 4)})
        model: Any = nn.ModuleDict({"a": inner, "q": nn.Linear(4, 4), "xq": nn.Linear(4, 4)})
        made = with_ranks(LoraConfig(r=1, target_modules=["q"]), {"a.q": first, "q": second})
        adapted: Any = get_peft_model(model, made)
        got = {
            n.rpartition("model.")[2]: m.r["default"] for n, m in adapted.named_modules() if hasattr(m, "base_layer")
        }
        assert got == {name: rank for name, rank in {"a.q": first, "q": second}.items() if rank}


def test_all_linear_restricted_layers_and_ranks_of_their_own_are_read_as_peft_reads_them() -> None:
    model: Any = nn.ModuleDict({"net": Net()})  # PEFT looks for the number behind two names
    lora = LoraConfig(
        r=2, target_modules=["q_proj", "up_proj"], layers_to_transform=[1, 2], rank_pattern={"up_proj": 4}
    )
    made = allocate(model, lora, score="weight")
    assert sum(made.rank_pattern.values()) == 2 * (2 + 4)
    assert {k.split(r"\.")[2] for k in made.rank_pattern} <= {"1", "2"}
    whole = allocate(model, LoraConfig(r=1, target_modules="all-linear"), score="weight", cap=1.0)
    assert sum(whole.rank_pattern.values()) == sum(isinstance(m, nn.Linear) for m in model.modules())


def test_what_cannot_work_is_refused_with_the_way_out() -> None:
    model = Chain()
    loss: Any = {"loss_fn": lambda x: model(x).sum()}
    wrong: list[tuple[str, dict[str, Any]]] = [
        (r"`allocate\(score='size'\)` must be one of", {"score": "size"}),
        (r"`allocate\(cap=0.5\)` must be at least 1", {"cap": 0.5}),
        (r"`allocate\(score='gradient'\)` looks at data", {"score": "gradient"}),
        (r"`hand_out\(budget=99\)` must lie in \[1, 18\]", {"score": "weight", "budget": 99}),
        (r"has no batch", {"batches": [], **loss}),
        (r"no batch has the 6 tokens", {"batches": [torch.ones(2, 12)], **loss}),
        (r"maps.0 was never run", {"batches": [torch.ones(9, 12)], "loss_fn": lambda x: None}),
    ]
    for message, options in wrong:
        with pytest.raises(ValueError, match=message):
            allocate(model, config(), **options)
    for message, targets in ((r"targets no module", ["z"]), ("name the modules", None)):
        with pytest.raises(ValueError, match=message):
            allocate(model, config(target_modules=targets), score="weight")
    with pytest.raises(ValueError, match=r"embed_tokens \(Embedding\), which is no linear map"):
        allocate(Net(), config(target_modules=["embed_tokens", "q_proj"]), score="weight")
    with pytest.raises(ValueError, match="PEFT would hand out the ranks again"):
        allocate(model, config(init_lora_weights="eva"), score="weight")
    for other in (AdaLoraConfig(total_step=9, target_modules=["0"]), EvaConfig()):
        with pytest.raises(TypeError, match=rf"`allocate\(config={type(other).__name__}\)` takes a `peft.LoraConfig`"):
            allocate(model, other, score="weight")
    with pytest.raises(ValueError, match="has adapters already"):
        allocate(get_peft_model(Chain(), config()), config(), score="weight")  # type: ignore[arg-type]


def test_processes_agree_on_ranks_of_different_batches() -> None:
    first, second = ranks(2).run(_ranks)
    assert first == second
    both = data(batches=4)
    model = Chain()
    joined = [torch.cat(pair) for pair in zip(both[::2], both[1::2], strict=True)]
    assert allocate(model, config(), joined, loss_fn=model).rank_pattern == first


def _ranks() -> Any:
    import torch.distributed as dist

    model = Chain()
    return allocate(model, config(), data(batches=4)[dist.get_rank() :: 2], loss_fn=model).rank_pattern

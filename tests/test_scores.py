"""Scores from weights and activations, against values computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import Net, lora_net
from transformers.pytorch_utils import Conv1D

from apportion.probe import BatchProbe
from apportion.scores import Outlier, Uniform, WeightNorm, outlier_count, square_sums
from apportion.types import Bound, Score, Unit, View


def units_of(*modules: nn.Module) -> Bound:
    return Bound(tuple(Unit(f"layer{i}", dict(m.named_parameters()), m, i) for i, m in enumerate(modules)))


def view(bound: Bound, probe: Any = None, **options: Any) -> View:
    return View(0, bound, torch.Generator().manual_seed(0), probe, **options)


def test_uniform_scores_are_equal_and_never_updated() -> None:
    score: Score = Uniform()
    state = score.init(5)
    assert score.read(state).tolist() == [1.0] * 5
    assert not any(score.due(step) for step in range(100))
    assert score.update(state, view(units_of())) is state


def test_the_weight_norm_is_the_mean_over_the_parameters_that_may_train() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        a.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        a.bias.copy_(torch.tensor([0.0, 1.0]))
        b.weight.fill_(0.5)
    score = WeightNorm()
    state = score.update(score.init(2), view(units_of(a, b)))
    assert score.read(state).tolist() == pytest.approx([3.0, 1.0])
    assert score.read(state).dtype == torch.float64
    assert WeightNorm(reverse=True).read(state).tolist() == pytest.approx([1 / 3.0, 1.0])


def test_half_precision_weights_are_summed_in_full_precision() -> None:
    linear = nn.Linear(16, 16, bias=False, dtype=torch.float16)
    nn.init.constant_(linear.weight, 30_000.0)  # two of them are beyond half precision
    score = WeightNorm()
    assert score.read(score.update({}, view(units_of(linear)))).item() == pytest.approx(480_000.0, rel=1e-6)


def test_weight_norms_are_measured_once_or_periodically() -> None:
    assert [step for step in range(9) if WeightNorm().due(step)] == [0]
    assert [step for step in range(9) if WeightNorm(every=4).due(step)] == [0, 4, 8]
    with pytest.raises(ValueError, match=r"`WeightNorm\(every=0\)`"):
        WeightNorm(every=0)


# Outlier
# -----------------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two matrices in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 3, bias=False)
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
            self.b.weight.copy_(torch.tensor([[1.0, 2.0], [-4.0, 0.5], [1.0, 1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_the_outlier_share_has_the_value_computed_by_hand() -> None:
    # Tokens (3, 0), (4, 0), (0, 2): norms of the inputs are 5 and 2, and a passes them on as they are.
    # a: A = [[5, 0], [0, 2]], mean 1.75: above 1.1 * 1.75 = 1.925 are the 5 and the 2, two of four.
    # b: A = [[5, 4], [20, 1], [5, 2]], mean 37/6: above 6.78 is the 20, one of six.
    model, batch = Two(), torch.tensor([[[3.0, 0.0], [4.0, 0.0]], [[0.0, 2.0], [0.0, 0.0]]])
    score = Outlier(threshold=1.1)
    probe = BatchProbe(lambda x: model(x).sum(), [batch], model)
    state = score.update(score.init(1), view(units_of(model), probe))
    assert score.read(state).tolist() == [3 / 10]
    assert not model.a._forward_pre_hooks
    each = score.update({}, view(units_of(model.a, model.b), probe))
    assert score.read(each).tolist() == [2 / 4, 1 / 6]


def test_inputs_of_several_batches_add_up() -> None:
    model = Two()
    tokens = torch.tensor([[0.0, 2.0], [3.0, 0.0], [4.0, 0.0]])
    probe = BatchProbe(lambda x: model(x).sum(), list(tokens.split(1)), model)
    score = Outlier(threshold=1.1, batches=3)
    assert score.read(score.update({}, view(units_of(model), probe))).tolist() == [3 / 10]


def test_a_matrix_that_met_no_input_does_not_count() -> None:
    model = Two()
    model.spare = nn.Linear(50, 50)
    probe = BatchProbe(lambda x: model(x).sum(), [torch.tensor([[5.0, 2.0]])], model)
    assert Outlier(threshold=1.1).update({}, view(units_of(model), probe))["score"].tolist() == [3 / 10]


def test_counting_in_chunks_changes_nothing() -> None:
    weight, norms = torch.randn(37, 11), torch.rand(11)
    a = weight.abs() * norms
    whole = int((a > 2.0 * a.mean()).sum())
    assert 0 < whole < a.numel()
    assert {outlier_count(weight, norms, 2.0, chunk) for chunk in (1, 11, 60, 10**6)} == {whole}


def test_transposed_matrices_are_read_the_right_way_round() -> None:
    linear, conv = nn.Linear(3, 5, bias=False), Conv1D(5, 3)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(5, 3).exp())
        conv.weight.copy_(linear.weight.T)
    x = torch.randn(4, 3) * torch.tensor([1.0, 10.0, 0.1])
    score = Outlier(threshold=1.5)
    shares = []
    for module in (linear, conv):
        probe = BatchProbe(lambda batch, module=module: module(batch).sum(), [x], module)  # type: ignore[misc]
        shares.append(score.read(score.update({}, view(units_of(module), probe))).item())
    assert shares[0] == shares[1] > 0


def test_base_weights_are_read_and_adapters_are_not() -> None:
    ids, shares = torch.arange(10).view(2, 5), []
    for model, path in ((Net(), "layers"), (lora_net(), "base_model.model.layers")):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.fill_(1e3 if "lora_A" in name else 0.0)  # adapters that add nothing to the activations
        layers = model.get_submodule(path)
        bound = Bound(tuple(Unit(str(i), {}, layer, i) for i, layer in enumerate(layers.children())))
        probe = BatchProbe(lambda batch, model=model: model(batch).sum(), [ids], model)  # type: ignore[misc]
        shares.append(Outlier(threshold=2.0).update({}, view(bound, probe))["score"])
    assert torch.equal(shares[0], shares[1])
    assert bool((shares[0] > 0).all())


def test_the_sums_are_averaged_over_ranks_before_anything_is_counted() -> None:
    model = Two()
    seen: list[Tensor] = []

    def mean(value: Tensor) -> Tensor:  # another rank saw only the second input
        seen.append(value)
        return torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)

    probe = BatchProbe(lambda x: model(x).sum(), [torch.tensor([[3.0, 0.0]])], model)
    state = Outlier(threshold=2.0).update({}, view(units_of(model), probe, mean=mean))
    assert seen[0].tolist() == [9.0, 0.0, 9.0, 0.0]
    # a: [[0, 0], [0, 1]], mean .25: the 1; b: [[0, 2], [0, .5], [0, 1]], mean .583: the 2
    assert state["score"].tolist() == [2 / 10]


def test_units_without_matrices_score_zero_and_models_without_any_are_refused() -> None:
    model = nn.Sequential(nn.LayerNorm(2), Two())
    probe = BatchProbe(lambda x: model(x).sum(), [torch.tensor([[3.0, 1.0]])], model)
    scores = Outlier(threshold=1.5).update({}, view(units_of(model[0], model[1]), probe))["score"]
    assert scores[0].item() == 0.0
    assert scores[1].item() > 0.0
    with pytest.raises(ValueError, match="met no input of a `Linear` or `Conv1D`"):
        Outlier().update({}, view(units_of(model[0]), probe))
    with pytest.raises(ValueError, match="needs a probe"):
        Outlier().update({}, view(units_of(model[1])))


def test_quantized_matrices_are_refused() -> None:
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(8, 1), requires_grad=False)
    probe = BatchProbe(lambda x: 0.0, [None], linear)
    with pytest.raises(ValueError, match=r"holds its weight as \(8, 1\) \(quantized\?\)"):
        Outlier().update({}, view(units_of(linear), probe))


@pytest.mark.parametrize("make", [lambda: Outlier(threshold=0.0), lambda: Outlier(batches=0)])
def test_nonsense_is_refused_at_construction(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"`Outlier\("):
        make()


def test_hooks_are_removed_after_an_exception() -> None:
    linear = nn.Linear(2, 2)
    with pytest.raises(KeyError), square_sums([linear]):
        raise KeyError
    assert not linear._forward_pre_hooks

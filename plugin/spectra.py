"""How much each further rank of an adapter is worth to its matrix, told before training.

A spectrum is a falling list of numbers, one for each rank that the adapter of a matrix could have. Three of them:

    variance   share of the variance of the matrix's inputs along their i-th principal direction, as EVA has it
    gradient   sigma_i(G)^2 of the mean gradient G = dL/dW: what a step along the i-th rank-1 part of G gains
    weight     sigma_i(W)^2 / sum_j sigma_j(W)^2 of the weight itself
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from apportion.calibrate import gather
from apportion.probe import quiet

Spectra = dict[str, Tensor]
"""float64 on the CPU, in falling order, by the name of the matrix."""


def variance(
    model: nn.Module, modules: Mapping[str, nn.Module], most: Mapping[str, int], run: Callable[[Any], Any], batches: Any
) -> Spectra:
    """Shares of the variance of each matrix's inputs along their principal directions.

        X - mean = U diag(s) V';   share_i = s_i^2 / sum_j s_j^2        over all tokens of all batches

    PEFT's incremental decomposition does the work, batch by batch, with its own seed. Matrices that are given the same
    tensor share one. Tokens that an ``attention_mask`` or a label of -100 leaves out do not count. The inputs of all
    ranks of a process group are taken together.

    Args:
        model: The model; it is run in eval mode and without gradients, and left as it was.
        modules: Its matrices, by name.
        most: Principal directions to look for, by name.
        run: ``run(batch)`` runs the model.
        batches: Batches, gone through once.

    Raises:
        ValueError: If there is no batch, a matrix is never run, or no batch has as many tokens as directions are asked
            for.
    """
    watch = _Watch(modules, most)
    met = 0
    with quiet(model), watch:
        for batch in batches:
            watch.begin(batch)
            run(batch)
            met += 1
    if not met:
        raise ValueError("`allocate(batches=...)` has no batch: give data, at least one batch of it.")
    return {name: watch.share(name, met) for name in modules}


def width(module: nn.Module) -> int:
    """Entries of one input of a linear map, also of a quantized one or of transformers' `Conv1D`."""
    held: Any = module
    return int(held.in_features if hasattr(held, "in_features") else held.weight.shape[0])


class _Watch(ExitStack):
    """Gathers the inputs of some modules while it is open."""

    def __init__(self, modules: Mapping[str, nn.Module], most: Mapping[str, int]) -> None:
        super().__init__()
        self.modules, self.most = modules, most
        self.leaders: dict[str, str] = {}  # the first module that is given the same tensor
        self.hooks: dict[str, Any] = {}
        self.given: list[tuple[Tensor, str]] = []  # of the present batch; held, so that no other takes its place
        self.mask: Tensor | None = None

    def __enter__(self) -> _Watch:
        for name, module in self.modules.items():
            self.callback(module.register_forward_pre_hook(self._hook(name), with_kwargs=True).remove)
        return self

    def begin(self, batch: Any) -> None:
        """Another batch comes."""
        self.given = []
        self.mask = _counted(batch)

    def _hook(self, name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered = args[0] if args else next(iter(kwargs.values()))
            leader = self.leaders.setdefault(name, next((n for x, n in self.given if x is entered), name))
            self.given.append((entered, leader))
            if leader == name:
                self._fit(name, entered)

        return look

    def _fit(self, name: str, entered: Tensor) -> None:
        from peft.tuners.lora.eva import SVDHook

        if name not in self.hooks:
            self.hooks[name] = SVDHook(n_components=self._asked(name), sim_thresh=1.0, name=name)
        inside = self.mask is not None and entered.shape[:-1] == self.mask.shape
        rows = entered[self.mask] if inside else entered.reshape(-1, entered.shape[-1])
        rows = self.hooks[name].gather_layer_inputs(rows.detach())
        if len(rows) >= self._asked(name):
            self.hooks[name].svd.partial_fit(rows.float())

    def _asked(self, name: str) -> int:
        """Directions to look for: as many as any matrix wants that may be given the same tensor."""
        return max(self.most[n] for n, m in self.modules.items() if width(m) == width(self.modules[name]))

    def share(self, name: str, met: int) -> Tensor:
        """The spectrum of one module."""
        hook = self.hooks.get(self.leaders.get(name, name))
        found: Tensor | None = getattr(getattr(hook, "svd", None), "explained_variance_ratio_", None)
        if hook is None:
            raise ValueError(f"`allocate(...)`: {name} was never run on the {met} batches: leave it out.")
        if found is None:
            raise ValueError(
                f"`allocate(...)`: no batch has the {self._asked(name)} tokens that the directions of {name} need: "
                "give larger batches, or lower `cap`."
            )
        return found[: self.most[name]].double().cpu()


def _counted(batch: Any) -> Tensor | None:
    """The tokens that count, bool, shape (rows, tokens); None if the batch does not say."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("attention_mask"), Tensor):
        return None
    mask: Tensor = batch["attention_mask"].bool()
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.shape == mask.shape:
        mask = mask & (labels != -100)
    return mask


def gradient(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    most: Mapping[str, int],
    run: Callable[[Any], Any],
    batches: Iterable[Any],
) -> Spectra:
    """Squared singular values of the mean gradient of each matrix.

        G = (1/N) sum_b dL_b/dW;   value_i = sigma_i(G)^2

    A step of size lr along the k largest rank-1 parts of G lowers the loss by lr (value_1 + ... + value_k) to first
    order, so values of different matrices compare. All mean gradients are held at once, in fp32.

    Args:
        model: The model; it is run in eval mode, and left as it was.
        modules: Its matrices, by name.
        most: Values to keep, by name.
        run: ``run(batch)`` gives the loss.
        batches: Batches, gone through once.
    """
    params: dict[str, nn.Parameter] = {name: module.weight for name, module in modules.items()}  # type: ignore[misc]
    found = gather(model, run, batches, params, lambda grad, weight: grad, None)
    return {name: _squares(found.pop(name))[: most[name]] for name in modules}


def weight(modules: Mapping[str, nn.Module], most: Mapping[str, int]) -> Spectra:
    """Squared singular values of each matrix, as shares of their sum.

        value_i = sigma_i(W)^2 / sum_j sigma_j(W)^2

    Args:
        modules: The matrices, by name.
        most: Values to keep, by name.

    Raises:
        ValueError: If a weight is quantized.

    Example:
        >>> linear = nn.Linear(2, 2)
        >>> _ = linear.weight.data.copy_(torch.diag(torch.tensor([1.0, 2.0])))
        >>> weight({"a": linear}, {"a": 2})["a"]
        tensor([0.8000, 0.2000], dtype=torch.float64)
    """
    found = {}
    for name, module in modules.items():
        held: Any = module.weight
        if not held.is_floating_point():
            raise ValueError(f"`allocate(score='weight')`: {name} is {held.dtype} (quantized?): use 'variance'.")
        squares = _squares(held.detach())
        found[name] = squares[: most[name]] / squares.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return found


def _squares(matrix: Tensor) -> Tensor:
    values: Tensor = torch.linalg.svdvals(matrix.float())
    return values.double().cpu().square()

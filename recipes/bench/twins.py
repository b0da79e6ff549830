"""Twins of codes that are no package: LMFlow's LISA, the official IST, LIFT and SaRA. Each is our own writing.

A twin holds what the original holds and computes what it computes, from descriptions of it, so that bytes and times can
be told beside ours on one machine. It is not the authors' code, and its speed is not the speed of theirs on their
hardware. Where an original has a fault that its memory and time do not depend on, the twin does without.

    LISA    the optimizer is made over all parameters and keeps the moments of layers that are frozen again
    IST     the same on adapters, with a draw before every step and three damped forward passes every ten
    LIFT    dense gradients; a bool mask on the CPU, copied over at every step; an SVD of each matrix at a refresh
    SaRA    a bool mask and compact values, gradients and moments; the penalty's gradient on a matrix ends beside them
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class LisaTwin:
    """Which layers require gradients, switched every ``interval`` steps; nothing else is seen to.

    Args:
        layers: Of the model.
        rounds: Numbers of the layers that train, one tuple for each interval.
        interval: Optimizer steps between switches.
    """

    def __init__(self, layers: Sequence[nn.Module], rounds: Sequence[tuple[int, ...]], interval: int) -> None:
        self.layers, self.rounds, self.interval = layers, rounds, interval

    def before_step(self, step: int) -> None:
        """To be called before the forward pass of optimizer step ``step``."""
        if step % self.interval:
            return
        chosen = self.rounds[step // self.interval % len(self.rounds)]
        for i, layer in enumerate(self.layers):
            layer.requires_grad_(i in chosen)


class IstTwin:
    """Draws adapters before every step, and learns from three damped passes every ten steps which matter.

    s_i: how unimportant layer i is;   draw without replacement with weights sigmoid(-s)
    s_i += 10 A_k p_i (1 - p_i) for each damped set k with layer i,   p = sigmoid(s),   A_k = exp(-L_k) - their mean

    Args:
        adapters: Of each layer: its adapter modules, whose ``scaling["default"]`` weighs what they add.
        seed: Of the draws.
    """

    EVERY, SETS, FACTOR, RATE = 10, 3, 0.25, 10.0

    def __init__(self, adapters: Sequence[Sequence[Any]], seed: int = 0) -> None:
        self.adapters = adapters
        self.scores = torch.zeros(len(adapters))
        self.generator = torch.Generator().manual_seed(seed)
        self.params = [[p for m in layer for p in m.parameters() if p.requires_grad] for layer in adapters]

    def _draw(self, weights: Tensor, share: float) -> list[int]:
        count = max(1, int(share * len(weights)))
        return [int(i) for i in torch.multinomial(weights, count, generator=self.generator)]

    def before_step(self, step: int, loss: Callable[[], Tensor]) -> None:
        """To be called before the forward pass of optimizer step ``step``; ``loss``: on the probe batch."""
        if step and step % self.EVERY == 0:
            self._learn(loss)
        chosen = self._draw(torch.sigmoid(-self.scores), 0.25)
        for i, params in enumerate(self.params):
            for p in params:
                p.requires_grad_(i in chosen)

    @torch.no_grad()
    def _learn(self, loss: Callable[[], Tensor]) -> None:
        p = torch.sigmoid(self.scores)
        sets = [self._draw(p, 0.5) for _ in range(self.SETS)]
        rewards = []
        for damped in sets:
            self._scale(damped, self.FACTOR)
            rewards.append(torch.exp(-loss()).cpu())
            self._scale(damped, 1.0 / self.FACTOR)
        advantages = torch.stack(rewards) - torch.stack(rewards).mean()
        for advantage, damped in zip(advantages, sets, strict=True):
            self.scores[damped] += self.RATE * advantage * p[damped] * (1.0 - p[damped])

    def _scale(self, layers: Iterable[int], factor: float) -> None:
        for adapter in [adapter for i in layers for adapter in self.adapters[i]]:
            adapter.scaling["default"] *= factor


def _adam(grad: Tensor, first: Tensor, second: Tensor, step: int, lr: float, betas: tuple[float, float]) -> Tensor:
    """The change that Adam makes, eps 1e-8; moments are moved on in place."""
    first.lerp_(grad, 1.0 - betas[0])
    second.mul_(betas[1]).addcmul_(grad, grad, value=1.0 - betas[1])
    corrected = (second / (1.0 - betas[1] ** step)).sqrt_().add_(1e-8)
    return -lr / (1.0 - betas[0] ** step) * first / corrected


class LiftTwin:
    """Adam on the largest entries of each matrix's low-rank part, with dense gradients.

    Args:
        params: Matrices.
        rank: Of the approximation, and of the adapter that has as many entries as are selected.
        interval: Steps between refreshes.
        lr: Learning rate.
        betas: Of Adam.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        rank: int,
        interval: int,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        self.params, self.rank, self.interval, self.lr, self.betas = list(params), rank, interval, lr, betas
        self.steps = 0
        self.masks = [self._mask(p) for p in self.params]
        self.state = {
            p: {key: p.new_zeros(int(mask.sum())).detach() for key in ("exp_avg", "exp_avg_sq")}
            for p, mask in zip(self.params, self.masks, strict=True)
        }

    @torch.no_grad()
    def _mask(self, p: nn.Parameter) -> Tensor:
        u, s, v = torch.linalg.svd(p.detach().float(), full_matrices=False)
        size = ((u[:, : self.rank] * s[: self.rank]) @ v[: self.rank]).abs_().flatten()
        count = min(sum(p.shape) * self.rank, p.numel())
        mask = torch.zeros(p.numel(), dtype=torch.bool, device=p.device)
        mask[size.topk(count).indices] = True
        return mask.view(p.shape).cpu()

    @torch.no_grad()
    def step(self) -> None:
        """Trains the selected entries; at the end of an interval they are selected anew, and kept ones keep moments."""
        self.steps += 1
        for i, p in enumerate(self.params):
            if p.grad is None:
                continue
            mask, state = self.masks[i].to(p.device), self.state[p]
            if self.steps % self.interval == 0:
                mask = self._refresh(i, p, mask)
            change = _adam(p.grad[mask], state["exp_avg"], state["exp_avg_sq"], self.steps, self.lr, self.betas)
            p.grad.zero_()
            p.grad[mask] = change
            p.add_(p.grad)

    def _refresh(self, i: int, p: nn.Parameter, old: Tensor) -> Tensor:
        self.masks[i] = self._mask(p)
        new = self.masks[i].to(p.device)
        for key, values in self.state[p].items():
            dense = torch.zeros_like(p)
            dense[old] = values
            self.state[p][key] = dense[new]
        return new

    def zero_grad(self) -> None:
        """Frees the gradients."""
        for p in self.params:
            p.grad = None


class SaraTwin:
    """AdamW on the weights below a size, gathered when gradients arrive, under a penalty on one matrix a step.

    Args:
        params: Candidates.
        threshold: Size below which a weight trains.
        lr: Learning rate.
        decay: Weight decay.
        nuclear: Weight of the nuclear norm of the selected part of one matrix, drawn anew at every step; 0 for none.
        min_side: Matrices with a shorter side are left out of the penalty.
        seed: Of these draws.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        threshold: float,
        lr: float,
        decay: float,
        nuclear: float = 5e-4,
        min_side: int = 65,
        seed: int = 0,
    ) -> None:
        self.params = list(params)
        self.masks = [p.detach().abs() < threshold for p in self.params]
        self.leaves = [nn.Parameter(p.detach()[mask]) for p, mask in zip(self.params, self.masks, strict=True)]
        self.base = torch.optim.AdamW(self.leaves, lr=lr, weight_decay=decay)
        self.nuclear, self.generator = nuclear, torch.Generator().manual_seed(seed)
        self.sources = [p.detach().requires_grad_() for p in self.params]  # the same storage, gradients of their own
        self.matrices = [i for i, p in enumerate(self.params) if p.ndim == 2 and min(p.shape) >= min_side]
        for p, mask, leaf in zip(self.params, self.masks, self.leaves, strict=True):
            p.register_post_accumulate_grad_hook(self._gatherer(mask, leaf))

    @staticmethod
    def _gatherer(mask: Tensor, leaf: nn.Parameter) -> Callable[[Any], None]:
        def gather(p: Any) -> None:
            part = p.grad[mask]
            leaf.grad = part if leaf.grad is None else leaf.grad + part
            p.grad = None

        return gather

    def penalty(self) -> None:
        """The gradient of the nuclear norm, which ends on a tensor that nothing updates, and stays there."""
        if not self.nuclear or not self.matrices:
            return
        i = self.matrices[int(torch.randint(len(self.matrices), (), generator=self.generator))]
        (self.nuclear * torch.linalg.matrix_norm(self.sources[i] * self.masks[i], "nuc")).backward()

    @torch.no_grad()
    def step(self) -> None:
        """Trains the selected weights."""
        with torch.enable_grad():
            self.penalty()
        self.base.step()
        for p, mask, leaf in zip(self.params, self.masks, self.leaves, strict=True):
            p[mask] = leaf

    def zero_grad(self) -> None:
        """Frees the gradients of the selected weights."""
        self.base.zero_grad()

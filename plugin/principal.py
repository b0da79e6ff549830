"""Principal weights: the entries that are large in the low-rank part of a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from apportion.candidates import Site
from apportion.entrywise import stream

_START = 1  # keeps the stream of starting bases apart from other draws at the same tensor
_SHARP = 1e-7  # below this ratio of eigenvalues a filter in fp32 would drown the small ones


@dataclass(frozen=True)
class Principal:
    """How large an entry is in the best approximation of its matrix by one of rank r.

        W ~ W_r = sum over i <= r of sigma_i u_i v_i^T;   score = |W_r|, or -|W_r| if ``reverse``

    Exactly by SVD, or by a basis of q = oversample x rank vectors that `subspace` turns towards the leading singular
    vectors. The basis is remembered, so that a refresh starts where the last one ended. Convolutions are looked at
    as matrices with one row for each output. Where there is nothing to approximate, in vectors and in matrices whose
    shorter side is at most ``rank``, the score is |w|.

    Share of the top 6.25% that is the same as with an exact SVD, for rank 32 and the defaults otherwise, the lowest of
    three matrices; the last column is one iteration after the top entries moved by 5% of the weights' deviation:

        matrix                                          2 iterations       4       6    1 more
        512 x 512, singular values j^-0.35                     97.9%  99.95%    100%    99.96%
        512 x 512, noise, which has no leading part            72.8%   97.4%   99.7%     99.7%
        1024 x 384, noise                                      69.4%   93.7%   99.5%     99.7%

    Ranks whose devices differ may differ in the last bits of W_r: choose on one and broadcast.

    Args:
        rank: Rank r of the approximation.
        exact: Whether to take an SVD of the whole matrix.
        oversample: Vectors in the basis for each rank, at least 2: the last ones do not converge.
        iterations: Filter steps from a random basis.
        warm: Whether to remember the basis.
        warm_iterations: Filter steps from a remembered basis.
        block: Side of tiles, from the upper left corner, that are chosen together: each entry scores the mean of its
            tile. The last tile chosen may be cut, since ties go by index. None for single entries.
        reverse: Makes the entries smallest in W_r the important ones, as the released code of the paper below does
            under its own settings since July 2025.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> weight = torch.tensor([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
        >>> Principal(rank=1, exact=True).entries(Site("w", 0, weight)).round(decimals=4)
        tensor([[2., 2., 0.],
                [2., 2., 0.],
                [0., 0., 0.]])

    References:
        Liu et al., *LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for Reasoning-Focused
        Supervised Fine-Tuning*, ICML 2025, https://arxiv.org/abs/2506.00772. Code: https://github.com/zihanghliu/LIFT
    """

    rank: int = 128
    exact: bool = False
    oversample: int = 2
    iterations: int = 6
    warm: bool = True
    warm_iterations: int = 1
    block: int | None = None
    reverse: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"weight"})
    grain: ClassVar[str] = "entry"

    def __post_init__(self) -> None:
        for name, least, why in (
            ("rank", 1, "it is the rank of the approximation"),
            ("oversample", 2, "the last vectors of a basis do not converge"),
            ("iterations", 1, "a random basis says nothing about the matrix"),
            ("warm_iterations", 1, "weights have changed since the basis was remembered"),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"`Principal({name}={getattr(self, name)!r})` must be at least {least}: {why}.")
        if self.block is not None and self.block < 1:
            raise ValueError(f"`Principal(block={self.block!r})` must be at least 1, or None for single entries.")

    @torch.no_grad()
    def entries(self, site: Site) -> Tensor:
        """|W_r| or -|W_r|, fp32, in the weight's shape; NaN throughout if a weight is not finite."""
        if site.weight.ndim < 2:
            sizes = site.weight.float().abs()
        else:
            with torch.autocast(site.weight.device.type, enabled=False):
                matrix = site.weight.reshape(site.weight.shape[0], -1).float()
                sizes = self._low_rank(matrix, site).abs()
            sizes = (sizes if self.block is None else tiles(sizes, self.block)).reshape(site.weight.shape)
        return -sizes if self.reverse else sizes

    def _low_rank(self, matrix: Tensor, site: Site) -> Tensor:
        if self.rank >= min(matrix.shape):
            return matrix
        if not bool(matrix.isfinite().all()):
            return torch.full_like(matrix, torch.nan)
        side, width = min(matrix.shape), min(min(matrix.shape), self.oversample * self.rank)
        if self.exact or width == side:  # a basis of everything is no saving
            return principal(matrix, self.rank)
        basis, iterations = site.memory.get("basis"), self.warm_iterations
        if basis is None or basis.shape != (side, width) or not self.warm:
            basis, iterations = torch.randn(side, width, generator=stream(site, _START)), self.iterations
        # Contiguous, as a checkpoint may give it back: the order in memory decides about the last bits of products.
        basis = subspace(matrix, basis.to(matrix), iterations).contiguous()
        if self.warm:
            site.memory["basis"] = basis
        return principal(matrix, self.rank, basis)


def principal(weight: Tensor, rank: int, basis: Tensor | None = None) -> Tensor:
    """The best approximation of a matrix by one of rank r, among all or among those that a basis can express.

        W_r = W P P^T      P: the leading r right singular vectors of W, or of W projected on the basis

    with W transposed if it is wider than high. Without a basis it is the truncated SVD; with the basis of a subspace
    that contains the leading singular vectors it is the same.

    Args:
        weight: The matrix, fp32, shape (m, n).
        rank: The rank, at least 1.
        basis: Orthonormal columns, fp32, shape (min(m, n), q), q at least ``rank``; None for an SVD.

    Returns:
        W_r, shape (m, n).

    Example:
        >>> weight = torch.tensor([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
        >>> principal(weight, 1).abs().round(decimals=4)
        tensor([[2., 2., 0.],
                [2., 2., 0.],
                [0., 0., 0.]])
    """
    if weight.shape[0] < weight.shape[1]:
        return principal(weight.T, rank, basis).T
    if basis is None:
        leading: Tensor = torch.linalg.svd(weight, full_matrices=False).Vh[:rank].T
    else:
        leading = basis @ _small_svd(weight @ basis)[1][:, :rank]
    return (weight @ leading) @ leading.T


def subspace(weight: Tensor, basis: Tensor, iterations: int) -> Tensor:
    """Turns a basis towards the leading singular vectors of a matrix, by filtered subspace iteration.

        V <- qr(T_2(2 / b W^T W - 1) V),   T_2(x) = 2 x^2 - 1,   b = the smallest eigenvalue of (W V)^T (W V)

    T_2 stays within 1 for the eigenvalues in [0, b], which are to go, and grows fast above: the vectors well above b
    converge, the last ones do not, so take q well above the number that is wanted. One iteration is two products with
    W^T W and brings about what four plain powers do. V enters as Ritz vectors, so that columns of very different growth
    do not drown one another; where eigenvalues span more than fp32 holds, the step is a plain power.

    Args:
        weight: The matrix, fp32, shape (m, n).
        basis: Any columns of full rank, fp32, shape (min(m, n), q).
        iterations: Number of filter steps.

    Returns:
        Orthonormal columns, shape (min(m, n), q).

    Example:
        >>> weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> basis = subspace(weight, torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]), iterations=6)
        >>> principal(weight, 1, basis).abs().round(decimals=4).diag()
        tensor([3., 0., 0.])

    References:
        Halko, Martinsson, Tropp, *Finding Structure with Randomness: Probabilistic Algorithms for Constructing
        Approximate Matrix Decompositions*, SIAM Review 53, 2011, https://arxiv.org/abs/0909.4061. Zhou, Saad, Tiago,
        Chelikowsky, *Self-consistent-field calculations using Chebyshev-filtered subspace iteration*, Journal of
        Computational Physics 219, 2006, https://doi.org/10.1016/j.jcp.2006.03.017
    """
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    basis = torch.linalg.qr(basis).Q
    for _ in range(iterations):
        image = tall @ basis
        sizes, turn = _small_svd(image)
        basis, power = basis @ turn, tall.T @ (image @ turn)
        least, most = sizes[-1].square(), sizes[0].square()
        if bool(least > _SHARP * most):
            first = 2 / least * power - basis
            power = 2 * (2 / least * (tall.T @ (tall @ first)) - first) - basis
        basis = torch.linalg.qr(power).Q
    return basis


def _small_svd(image: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values and right singular vectors (as columns) of a tall matrix, by way of its triangular factor."""
    _, sizes, right = torch.linalg.svd(torch.linalg.qr(image, mode="r").R)
    return sizes, right.T


def tiles(scores: Tensor, block: int) -> Tensor:
    """Each entry's mean over its ``block`` x ``block`` tile; tiles at the edges hold what is left. Shape (m, n).

    Example:
        >>> tiles(torch.tensor([[1.0, 3.0, 5.0], [1.0, 3.0, 7.0]]), 2)
        tensor([[2., 2., 6.],
                [2., 2., 6.]])
    """
    means = avg_pool2d(scores[None, None], block, stride=block, ceil_mode=True)[0, 0]
    spread = means.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return spread[: scores.shape[0], : scores.shape[1]]

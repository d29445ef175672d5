"""The zero-inflated negative binomial of counts: its likelihood, its fit, draws, and its distribution function.

A count is 0 with probability pi, an excess zero; else it is negative binomial with mean m and inverse dispersion theta,
so that its variance is m + m^2 / theta. All is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from ..errors import InputError
from ..threads import blocks_of

THETA_RANGE = (1e-4, 1e4)
"""From here to here theta is sought. At its upper end the law is as good as Poisson's."""

PI_RANGE = (1e-10, 1 - 1e-6)
"""As for theta. What ends at the lower end has no excess zeros, and is given back as 0."""

SMALLEST_SCALE = 1e-10
"""Of a gene without any count."""

AT_ONCE = 2**19
"""Counts of a block of genes: some twenty arrays of so many numbers, of 4 MB each, are alive at a time."""

FLAT = 1e-4
"""Log-likelihoods of all spots that differ by less are the same: of such laws the simpler one is kept."""

GAIN = 1e-9
"""A gene is at its optimum when the next step promises less, in log-likelihood."""

MOST_STEPS = 200

SMALL = 16
"""Counts below which a quantile is found by a sum of probabilities: thirty times as fast as scipy's, for each."""


class ZinbFit(NamedTuple):
    """What :func:`fit` returns, float64.

    ``fell_back`` says which genes show no over-dispersion, or no count at all: theta is at the end of its range, where
    the law is Poisson's, with excess zeros (pi above 0) only where these raise the likelihood.
    """

    scale: np.ndarray  # [G]
    theta: np.ndarray  # [G]
    pi: np.ndarray  # [G]
    fell_back: np.ndarray  # [G] bool


def log_likelihood(
    counts: np.ndarray, mean: np.ndarray | float, theta: np.ndarray | float, pi: np.ndarray | float
) -> np.ndarray:
    """Of each count, float64; the arguments are broadcast. ``mean`` and ``theta`` are above 0, ``pi`` is from 0 to 1,
    1 excluded."""
    given = (torch.as_tensor(np.asarray(part, dtype=np.float64)) for part in (counts, mean, theta, pi))
    count, expected, dispersion, share = given
    log_regular = torch.log1p(-share) + _log_negative_binomial(count, expected, dispersion)
    return torch.where(count == 0, torch.logaddexp(torch.log(share), log_regular), log_regular).numpy()


def draw(mean: np.ndarray, theta: np.ndarray, pi: np.ndarray, generators: Sequence[np.random.Generator]) -> np.ndarray:
    """Counts, float32, in the shape that ``mean`` has; ``theta`` and ``pi`` are broadcast to it.

    Args:
        generators: streams of the rates, of the counts and of the excess zeros; each is filled in the order of the
            counts, so that none depends on how many follow.
    """
    return draw_by_odds(mean.shape, theta, mean / theta, pi, generators)


def draw_by_odds(
    shape: int | tuple[int, ...],
    theta: float | np.ndarray,
    odds: float | np.ndarray,
    pi: float | np.ndarray,
    generators: Sequence[np.random.Generator],
) -> np.ndarray:
    """As :func:`draw`, of the mean ``theta * odds``, and where all counts have one law of numbers."""
    for_rate, for_counts, for_zeros = generators
    rate = for_rate.standard_gamma(theta, shape, dtype=np.float32)
    rate *= np.float32(odds)
    counts = for_counts.poisson(rate).astype(np.float32)
    counts[for_zeros.random(shape, dtype=np.float32) < pi] = 0.0
    return counts


def cdf(count: np.ndarray, mean: np.ndarray, theta: np.ndarray, pi: np.ndarray) -> np.ndarray:
    """Probability of at most ``count``, float64; the arguments are broadcast."""
    from scipy.stats import nbinom  # half a second of every start, for what few commands ask

    count, mean, theta, pi = (np.asarray(part, dtype=np.float64) for part in (count, mean, theta, pi))
    regular = nbinom.cdf(count, theta, theta / (theta + mean))
    return np.where(count < 0, 0.0, pi + (1 - pi) * regular)


def quantile(probability: np.ndarray, mean: np.ndarray, theta: np.ndarray, pi: np.ndarray) -> np.ndarray:
    """The smallest count whose :func:`cdf` reaches ``probability``, of 0 to 1; float64, the arguments are broadcast."""
    from scipy.stats import nbinom

    probability, mean, theta, pi = (np.asarray(part, dtype=np.float64) for part in (probability, mean, theta, pi))
    regular, theta, mean = np.broadcast_arrays(np.clip((probability - pi) / (1 - pi), 0.0, 1.0), theta, mean)
    share, found = mean / (theta + mean), np.zeros(regular.shape)
    term = np.exp(-theta * np.log1p(mean / theta))
    total = term.copy()
    for count in range(SMALL):
        found += total < regular
        term *= (count + theta) / (count + 1) * share
        total += term
    large = found == SMALL
    found[large] = nbinom.ppf(regular[large], theta[large], 1 - share[large])
    return found


def fit(counts: np.ndarray | scipy.sparse.spmatrix, base: np.ndarray | None = None) -> ZinbFit:
    """Maximum likelihood of every gene by itself.

    The likelihood may have two maxima, one where zeros are dispersion and one where they are excess: it is climbed from
    both sides by Newton's method, and the better one is kept.

    Args:
        counts: [N, G] counts, dense or sparse; what is sparse is made dense by blocks of genes, if at all.
        base: [N, G] above 0, or None for ones; the mean of a count is ``scale * base``.

    Raises:
        InputError: no spots, or a base that is not above 0.
    """
    if counts.shape[0] == 0:
        raise InputError("counts: of no spots; a fit needs some")
    if base is not None and not (base.shape == counts.shape and base.min(initial=1.0) > 0):
        raise InputError(f"base: must be above 0 and of shape {list(counts.shape)}")
    columns = scipy.sparse.csc_matrix(counts) if scipy.sparse.issparse(counts) else counts
    width = max(1, AT_ONCE // counts.shape[0])
    parts = [_fit_block(_block(columns, base, genes)) for genes in blocks_of(counts.shape[1], width)]
    if not parts:
        return ZinbFit(*(np.empty(0, dtype) for dtype in (float, float, float, bool)))
    return ZinbFit(*(np.concatenate(part) for part in zip(*parts, strict=True)))


class _Block(NamedTuple):
    """Counts of some genes. What is 0 has the same law in all spots where ``base`` is one: then rows is 1, else N."""

    gene: Tensor  # [positive] of each count above 0, ascending
    number: Tensor  # [positive]
    base: Tensor  # [positive]
    zero_base: Tensor  # [rows, G]
    zeros: Tensor  # [rows, G] how many counts of 0 each row stands for

    def of_genes(self, chosen: Tensor) -> _Block:
        """Those genes alone; ``chosen`` [G] is boolean."""
        kept, place = chosen[self.gene], torch.cumsum(chosen, 0) - 1
        positive = (place[self.gene[kept]], self.number[kept], self.base[kept])
        return _Block(*positive, self.zero_base[:, chosen], self.zeros[:, chosen])

    def total(self, of_positive: Tensor, of_zeros: Tensor) -> Tensor:
        """Sums over the spots [G] of what each count above 0 gives [positive], and each row of zeros [rows, G]."""
        n_genes = self.zeros.shape[1]
        positive = torch.zeros(n_genes, dtype=torch.float64).index_add_(0, self.gene, of_positive)
        return positive + (self.zeros * of_zeros).sum(dim=0)


def _block(counts: np.ndarray | scipy.sparse.csc_matrix, base: np.ndarray | None, genes: slice) -> _Block:
    held = scipy.sparse.csc_matrix(counts[:, genes])
    held.eliminate_zeros()
    n_positive = np.diff(held.indptr)
    gene = np.repeat(np.arange(held.shape[1]), n_positive)
    if base is None:
        positive_base, zero_base = np.ones(held.nnz), np.ones((1, held.shape[1]))
        zeros = (held.shape[0] - n_positive)[None]
    else:
        zero_base = base[:, genes]
        positive_base, zeros = zero_base[held.indices, gene], held.toarray() == 0
    arrays = (gene, held.data, positive_base, zero_base, zeros)
    dtypes = (np.int64, *[np.float64] * 4)
    return _Block(*(torch.from_numpy(np.array(part, dtype)) for part, dtype in zip(arrays, dtypes, strict=True)))


def _fit_block(block: _Block) -> ZinbFit:
    one = torch.ones_like(block.base), torch.ones_like(block.zero_base)
    positive = block.total(one[0], 0 * one[1])
    poisson = block.total(block.number, 0 * one[1]) / block.total(block.base, block.zero_base)
    known = positive > 0
    scale = poisson.clamp(min=SMALLEST_SCALE)
    theta, pi = torch.full_like(scale, THETA_RANGE[1]), torch.full_like(scale, PI_RANGE[0])
    if known.any():
        found = _best_of(block.of_genes(known), poisson[known])
        scale[known], theta[known], pi[known] = _natural(found)
    fell_back = theta >= THETA_RANGE[1] * (1 - 1e-9)
    pi[pi <= PI_RANGE[0]] = 0.0
    return ZinbFit(scale.numpy(), theta.numpy(), pi.numpy(), fell_back.numpy())


def _best_of(block: _Block, poisson: Tensor) -> Tensor:
    """The best coordinates [3, G] of the two that are climbed to, and of Poisson's law, which wins where it is as good:
    there is nothing that could tell theta or pi."""
    mean, zero_mean = poisson[block.gene] * block.base, poisson * block.zero_base
    beyond = block.total((block.number - mean) ** 2 - mean, zero_mean**2 - zero_mean)
    theta = block.total(mean**2, zero_mean**2) / beyond.clamp(min=1e-9)
    share = block.total(0 * block.base, torch.ones_like(block.zeros)) / block.total(
        torch.ones_like(block.base), torch.ones_like(block.zeros)
    )
    half = 0.5 * share
    starts = (
        _coordinates(poisson, theta.clamp(0.05, 100.0), torch.full_like(poisson, 0.02)),
        _coordinates(poisson / (1 - half), torch.full_like(poisson, 2.0), half.clamp(min=0.02)),
    )
    best = _coordinates(poisson, torch.full_like(poisson, THETA_RANGE[1]), torch.full_like(poisson, PI_RANGE[0]))
    reached = _evaluate(block, best).value + FLAT
    for start in starts:
        found, value = _climb(block, start)
        best = torch.where(value > reached, found, best)
        reached = torch.maximum(value, reached)
    return best


def _coordinates(scale: Tensor, theta: Tensor, pi: Tensor) -> Tensor:
    """[3, G]: log scale, log(1 + 1 / theta) and pi. In the second, which is -log(theta) of a small theta and 1 / theta
    of a large one, the likelihood has a slope at Poisson's law, so that a law without over-dispersion is reached in
    some steps; so has it in pi where there are no excess zeros."""
    return torch.stack([torch.log(scale), torch.log1p(1 / theta), pi])


def _natural(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.exp(x[0]), 1 / torch.expm1(x[1]), x[2]


_LOWER = torch.tensor([[-700.0], [np.log1p(1 / THETA_RANGE[1])], [PI_RANGE[0]]], dtype=torch.float64)
_UPPER = torch.tensor([[700.0], [np.log1p(1 / THETA_RANGE[0])], [PI_RANGE[1]]], dtype=torch.float64)
_LONGEST = torch.tensor([[2.0], [2.0], [0.3]], dtype=torch.float64)
"""Of a step."""


class _Value(NamedTuple):
    """The log-likelihood of each gene, and its slope and curvature in the coordinates."""

    value: Tensor  # [G]
    slope: Tensor  # [3, G]
    curvature: Tensor  # [3, 3, G]

    def of_genes(self, chosen: Tensor) -> _Value:
        return _Value(*(part[..., chosen] for part in self))


def _climb(block: _Block, start: Tensor) -> tuple[Tensor, Tensor]:
    """Newton's method of all genes side by side, each with its own length of step; a gene that has arrived is left out.

    Returns:
        Coordinates [3, G] of a maximum, and the log-likelihood there [G].
    """
    best, reached = start.clone(), torch.empty(start.shape[1], dtype=torch.float64)
    genes, x, now = torch.arange(start.shape[1]), start, _evaluate(block, start)
    length = torch.ones_like(now.value)
    for _ in range(MOST_STEPS):
        step, gain = _newton(x, now)
        moving = (gain > GAIN) & (length > 1e-6)
        best[:, genes], reached[genes] = x, now.value
        if not moving.all():
            genes, x, length, step, now = (
                genes[moving],
                x[:, moving],
                length[moving],
                step[:, moving],
                now.of_genes(moving),
            )
            if not len(genes):
                break
            block = block.of_genes(moving)
        tried = torch.clamp(x + length * step, _LOWER, _UPPER)
        then = _evaluate(block, tried)
        better = then.value > now.value
        x, length = torch.where(better, tried, x), torch.where(better, (2 * length).clamp(max=1.0), length / 4)
        now = _Value(*(torch.where(better, new, old) for new, old in zip(then, now, strict=True)))
    best[:, genes], reached[genes] = x, now.value
    return best, reached


def _newton(x: Tensor, at: _Value) -> tuple[Tensor, Tensor]:
    """A step [3, G] up, and what it promises [G]. A coordinate that would leave its range goes to the end of it, and
    the others as is best then; the first to leave is the first to be held. Where the likelihood is not concave, the
    curvature counts by its size; where all this would lead down, the step is along the slope."""
    size = at.curvature.diagonal().abs().T.clamp(min=1e-12).sqrt()
    curvature = at.curvature / (size[:, None] * size[None])
    ended, step = torch.zeros_like(x, dtype=torch.bool), torch.zeros_like(x)
    alone = -torch.eye(len(x), dtype=x.dtype)[..., None]
    for _ in range(len(x) + 1):
        to_end = torch.where(ended, step * size, 0.0)
        slope = torch.where(ended, 0.0, at.slope / size + torch.einsum("ijg,jg->ig", curvature, to_end))
        free = torch.where(ended[:, None] | ended[None], alone, curvature)
        values, vectors = torch.linalg.eigh(free.permute(2, 0, 1))
        along = torch.einsum("gij,ig->gj", vectors, slope) / values.abs().clamp(min=1e-8)
        step = torch.where(ended, step, torch.einsum("gij,gj->ig", vectors, along) / size)
        inside = _within(x, step)
        leaving = (inside != step) & ~ended
        if not leaving.any():
            break
        share = torch.where(leaving, inside / step, torch.inf)
        first = leaving & (share <= share.amin(dim=0))
        step, ended = torch.where(first, inside, step), ended | first
    rising = (at.slope * step).sum(dim=0) > 0
    step = torch.where(rising, step, _within(x, at.slope / size**2))
    step = step / (step.abs() / _LONGEST).amax(dim=0).clamp(min=1.0)
    return step, (at.slope * step).sum(dim=0)


def _within(x: Tensor, step: Tensor) -> Tensor:
    """The step, cut off where it would leave the range of a coordinate."""
    return torch.minimum(torch.maximum(step, _LOWER - x), _UPPER - x)


def _evaluate(block: _Block, x: Tensor) -> _Value:
    scale, theta, pi = _natural(x)
    t = theta[block.gene]
    mean = scale[block.gene] * block.base
    of_positive = _slopes(block.number, mean, t)
    digamma, trigamma = torch.digamma(theta), torch.polygamma(1, theta)
    of_positive.theta.add_(torch.digamma(block.number + t) - digamma[block.gene])
    of_positive.theta_theta.add_(torch.polygamma(1, block.number + t) - trigamma[block.gene])

    zero_mean = scale * block.zero_base
    of_zero = _slopes(torch.zeros_like(zero_mean), zero_mean, theta)
    log_regular = _log_no_count(zero_mean, theta)
    log_zero = torch.logaddexp(torch.log(pi), torch.log1p(-pi) + log_regular)
    regular = torch.exp(torch.log1p(-pi) + log_regular - log_zero)  # share of such zeros that are no excess
    mixed = regular * (1 - regular)
    by_pi = -torch.expm1(log_regular) * torch.exp(-log_zero)  # slope of log_zero
    with_pi = -torch.exp(log_regular - 2 * log_zero)  # of that, by log_regular

    inside, nothing = 1 / (1 - pi), torch.zeros_like(t)
    value = block.total(_log_negative_binomial(block.number, mean, t) + torch.log1p(-pi)[block.gene], log_zero)
    eta = block.total(of_positive.eta, regular * of_zero.eta)
    by_theta = block.total(of_positive.theta, regular * of_zero.theta)
    eta_eta = block.total(of_positive.eta_eta, regular * of_zero.eta_eta + mixed * of_zero.eta**2)
    eta_theta = block.total(of_positive.eta_theta, regular * of_zero.eta_theta + mixed * of_zero.eta * of_zero.theta)
    theta_theta = block.total(of_positive.theta_theta, regular * of_zero.theta_theta + mixed * of_zero.theta**2)
    eta_pi, theta_pi = block.total(nothing, with_pi * of_zero.eta), block.total(nothing, with_pi * of_zero.theta)
    slope_pi = block.total(-inside[block.gene], by_pi)
    pi_pi = block.total(-(inside**2)[block.gene], -(by_pi**2))

    turn = -theta * (theta + 1)  # slope of theta by its coordinate
    theta_theta = theta_theta * turn**2 - by_theta * (2 * theta + 1) * turn
    eta_theta, theta_pi = eta_theta * turn, theta_pi * turn
    rows = ((eta_eta, eta_theta, eta_pi), (eta_theta, theta_theta, theta_pi), (eta_pi, theta_pi, pi_pi))
    return _Value(value, torch.stack([eta, by_theta * turn, slope_pi]), torch.stack([torch.stack(row) for row in rows]))


class _Slopes(NamedTuple):
    """Of the log-likelihood of a negative binomial, by the logarithm eta of its mean, and by theta."""

    eta: Tensor
    theta: Tensor
    eta_eta: Tensor
    eta_theta: Tensor
    theta_theta: Tensor


def _slopes(count: Tensor, mean: Tensor, theta: Tensor) -> _Slopes:
    """Without what log Gamma(count + theta) - log Gamma(theta) adds by theta, nothing where the count is 0."""
    both = theta + mean
    over = (count - mean) / both
    return _Slopes(
        theta * over,
        -over - torch.log1p(mean / theta),
        -mean * theta * (count + theta) / both**2,
        mean * over / both,
        mean / (theta * both) + over / both,
    )


def _log_negative_binomial(count: Tensor, mean: Tensor, theta: Tensor) -> Tensor:
    ways = torch.lgamma(count + theta) - torch.lgamma(theta) - torch.lgamma(count + 1)
    return ways + _log_no_count(mean, theta) + torch.xlogy(count, mean / (theta + mean))


def _log_no_count(mean: Tensor, theta: Tensor) -> Tensor:
    return -theta * torch.log1p(mean / theta)

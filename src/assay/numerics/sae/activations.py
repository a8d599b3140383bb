"""What makes codes of pre-activations, and of tokens where there are none.

Sources: topk, Gao et al. 2024; jumprelu, Rajamanoharan et al. 2024; batchtopk, Bussmann et al.
2024; abstopk, arXiv:2510.00404; matching pursuit, Mallat and Zhang 1993.
"""

from __future__ import annotations

import torch
from torch import Tensor

from assay.architecture import Architecture
from assay.numerics.precision import product


def activate(pre: Tensor, architecture: Architecture, threshold: Tensor | None) -> Tensor:
    """Codes (b, n) of the pre-activations (b, n), by any activation but matching pursuit.

    Args:
        pre: float32.
        architecture: the activation, with what goes with it.
        threshold: (n,), (1,) or one number, for `jumprelu`.
    """
    match architecture.activation:
        case "topk":
            kept = _largest(pre, pre, architecture.k)
            return kept if architecture.signed else kept.clamp(min=0)
        case "abstopk":
            return _largest(pre, pre.abs(), architecture.k)
        case "groupmax":
            assert architecture.k is not None
            groups = pre.view(len(pre), architecture.k, pre.shape[1] // architecture.k)
            largest = groups.argmax(2, keepdim=True)
            kept = torch.zeros_like(groups).scatter_(2, largest, groups.gather(2, largest))
            return kept.flatten(1).clamp(min=0)
        case "jumprelu":
            assert threshold is not None
            # A threshold may be negative: some libraries save -1 until training has set it.
            above = pre >= threshold if architecture.keeps_equal else pre > threshold
            return torch.where(above, pre.clamp(min=0), 0.0)
        case _:
            return pre.clamp(min=0)


def _largest(pre: Tensor, by: Tensor, k: int | None) -> Tensor:
    """The k entries of each row where ``by`` is largest, ties to the lower index; 0 elsewhere."""
    assert k is not None
    kept = largest(by, k)
    return torch.zeros_like(pre).scatter_(1, kept, pre.gather(1, kept))


def largest(by: Tensor, k: int) -> Tensor:
    """Where the k largest entries of each row of ``by`` (b, n) are, int64 (b, k), by falling size,
    ties to the lower index. Which of several zeros are named is left open.

    `torch.topk` takes a thirtieth of the time of a stable sort, and promises nothing about ties.
    """
    if k * 4 >= by.shape[1]:
        return by.argsort(dim=1, descending=True, stable=True)[:, :k]
    values, indices = by.topk(k + 1, dim=1)
    indices, last = indices[:, :k], values[:, k - 1 : k]
    # Of the equals at the end, others may have to be in: those of the lowest index, as many as
    # there is room for.
    tied = ((values[:, k:] == last) & (last != 0)).squeeze(1).nonzero().squeeze(1)
    if len(tied):
        rows, least = by[tied], last[tied]
        above, equal = rows > least, rows == least
        room = k - above.sum(1, keepdim=True)
        indices[tied] = (above | (equal & (equal.cumsum(1) <= room))).nonzero()[:, 1].view(-1, k)
    indices = indices.sort(dim=1).values
    order = by.gather(1, indices).argsort(dim=1, descending=True, stable=True)
    return indices.gather(1, order)


def pursue(x: Tensor, W_dec: Tensor, architecture: Architecture) -> Tensor:  # noqa: N803
    """Codes (b, n) of centered tokens x (b, d), float32, by matching pursuit over the rows of
    W_dec (n, d).

    Rows end one by one, so that a code does not depend on what else is in its batch.
    """
    left, codes = x.clone(), x.new_zeros(len(x), len(W_dec))
    going = torch.arange(len(x), device=x.device)
    for _ in range(architecture.max_iterations or x.shape[1]):
        if not len(going):
            break
        rest = left[going]
        products = product(rest, W_dec.T)
        best = products.argmax(1)
        chosen = W_dec[best]
        value = (rest * chosen).sum(1).clamp(min=0)
        before = codes[going, best]
        codes[going, best] = before + value
        left[going] = rest - value[:, None] * chosen
        ended = torch.zeros_like(going, dtype=torch.bool)
        if architecture.stop_on_duplicate_support:
            ended |= (before != 0) == ((before + value) != 0)
        if architecture.residual_threshold > 0:
            ended |= left[going].norm(dim=1) < architecture.residual_threshold
        going = going[~ended]
    return codes

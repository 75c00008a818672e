"""One step of AdamW and one of Muon, as pure functions of tensors.

Not here: which parameters get which, and where their gradients come from (`optim.py`).
"""

import math

import torch
from torch import Tensor

# Polar Express (arXiv 2505.16932), degree 5, five steps: coefficients (a, b, c) of X <- a X + b (XX')X + c (XX')^2 X
POLAR_STEPS = (
    (8.15655, -22.48329, 15.87877),
    (4.04293, -2.80892, 0.50002),
    (3.89167, -2.77248, 0.50606),
    (3.28575, -2.36813, 0.46449),
    (2.34654, -1.70978, 0.42324),
)
POLAR_SAFETY = 1.02  # factor on the norm: rounding must not leave the interval in which the iteration converges
TINY = 1e-7  # added to norms that may be zero (padding, parameters without gradient)


def adamw_update(p, grad, exp_avg, exp_avg_sq, *, step_size, beta1, beta2, correction2, eps, decay) -> None:
    """One AdamW step (arXiv 1711.05101) in place on `p` and its two moments, all of one shape.

    step_size = lr / (1 - beta1^t), correction2 = sqrt(1 - beta2^t), decay = lr * weight_decay; numbers or 0-d tensors.
    The bias is corrected before eps is added. The moments are float32, `p` may be narrower.
    """
    grad = grad.to(exp_avg.dtype)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.lerp_(grad.square(), 1 - beta2)
    direction = exp_avg / (exp_avg_sq.sqrt().div_(correction2).add_(eps))
    p.copy_(p.to(exp_avg.dtype) * (1 - decay) - direction.mul_(step_size))


def polar_express(x: Tensor) -> Tensor:
    """Approximate the orthogonal polar factor of each matrix of x (..., m, n): singular values of at least 1e-3 of the
    Frobenius norm end between 0.84 and 1.15, smaller ones below that."""
    is_tall = x.size(-2) > x.size(-1)
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * POLAR_SAFETY + TINY)
    for a, b, c in POLAR_STEPS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if is_tall else x


def muon_update(p, grad, momentum_buffer, row_variance, *, lr, momentum, beta2, weight_decay, dtype) -> None:
    """One Muon step in place on stacked matrices p (K, m, n) and their state.

    Nesterov momentum; rows normalised, then orthogonalised in `dtype`; per-row variance normalisation (NorMuon, arXiv
    2510.05491) at constant Frobenius norm sqrt(min(m, n)); a rate that grows with sqrt(m / n) for tall matrices; weight
    decay only where it has the sign of the update (arXiv 2510.12402). momentum_buffer: (K, m, n), row_variance:
    (K, m, 1), both float32.
    """
    m, n = p.shape[-2:]
    grad = grad.to(momentum_buffer.dtype)
    momentum_buffer.lerp_(grad, 1 - momentum)
    update = grad.lerp(momentum_buffer, momentum)
    update = update / (update.norm(dim=-1, keepdim=True) + TINY)
    update = polar_express(update.to(dtype)).float()
    row_variance.lerp_(update.square().mean(dim=-1, keepdim=True), 1 - beta2)
    update = update / (row_variance.sqrt() + TINY)
    update = update * (math.sqrt(min(m, n)) / (update.norm(dim=(-2, -1), keepdim=True) + TINY))
    decayed = torch.where(update * p > 0, p, torch.zeros_like(p))
    p.sub_(lr * math.sqrt(max(1.0, m / n)) * update + lr * weight_decay * decayed)

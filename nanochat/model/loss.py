"""Cross-entropy of a soft-capped vocabulary head, without ever holding the logits of a whole batch.

A batch's logits are the largest tensor of a small model: 2 GB in float32 for 16 K tokens and a vocabulary of 32,768.
Here they are computed a few rows at a time, and forward turns each piece into its gradient at once, while it is still
in the cache (CPU) or fits beside the activations (GPU); only the gradients of the hidden states and of the head are
kept. This works because the loss is a sum, whose gradient is known up to the factor that backward receives.
"""

import torch
from torch import Tensor

from nanochat.model.products import add_product_

IGNORE_INDEX = -1  # a target with this value counts neither in the loss nor in its mean
CPU_PIECE_ELEMENTS = 1 << 24  # logits per piece: 64 MB of float32, enough rows for fast matrix products
GPU_PIECE_ELEMENTS = 1 << 27  # 256 MB of bfloat16
CPU_BLOCK_ELEMENTS = 1 << 20  # logits per elementwise pass within a piece: 4 MB, to stay in the cache


def softcap_logits(hidden: Tensor, weight: Tensor, softcap: float) -> Tensor:
    """`softcap * tanh(hidden @ weight.T / softcap)` in float32; hidden (..., C), weight (V, C) -> (..., V)."""
    z = (hidden @ weight.to(hidden.dtype).T).float()
    return softcap * torch.tanh(z / softcap)


def softcap_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, softcap: float, vocab_size: int | None = None,
    copy: Tensor | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Cross-entropy, in nats, of targets under `softcap_logits(hidden, weight, softcap)`.

    hidden (..., C) in the compute dtype, weight (V, C), targets (...) int64, `IGNORE_INDEX` where nothing is to be
    predicted. Rows of `weight` from `vocab_size` on are padding, no classes; `copy` is the weight in the compute dtype,
    if there is one already. `reduction`: "mean" over the targets that count (0 if there are none), "sum", or "none" for
    a float32 loss per target, 0 where ignored, without gradients.
    """
    rows, flat_targets = hidden.flatten(0, -2), targets.flatten()
    vocab_size = weight.size(0) if vocab_size is None else vocab_size
    if reduction == "none":
        with torch.no_grad():
            used = _used_rows(rows, weight, vocab_size, copy)
            pieces = _pieces(rows, used.size(0))
            losses = [_losses(rows[part], used, flat_targets[part], softcap, vocab_size) for part in pieces]
            return torch.cat(losses).view_as(targets)
    total = _SoftcapCrossEntropySum.apply(rows, weight, flat_targets, softcap, vocab_size, copy)
    if reduction == "sum":
        return total
    assert reduction == "mean", reduction
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


def _pieces(rows: Tensor, vocab_size: int) -> list[slice]:
    step = max(1, (GPU_PIECE_ELEMENTS if rows.is_cuda else CPU_PIECE_ELEMENTS) // vocab_size)
    return [slice(start, start + step) for start in range(0, rows.size(0), step)]


def _used_rows(rows: Tensor, weight: Tensor, vocab_size: int, copy: Tensor | None) -> Tensor:
    """The rows of `weight` that take part in products, in the dtype of `rows`. On a GPU the padding does: rows of
    logits must begin at multiples of 16 bytes, or matrix kernels are several times slower."""
    weight = weight if copy is None else copy
    return (weight if rows.is_cuda else weight[:vocab_size]).to(rows.dtype)


def _losses(rows: Tensor, weight: Tensor, targets: Tensor, softcap: float, vocab_size: int) -> Tensor:
    logits = softcap_logits(rows, weight, softcap)[:, :vocab_size]
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")


class _SoftcapCrossEntropySum(torch.autograd.Function):
    """Sum of the losses. Forward computes the gradients too, piece by piece; backward only scales them."""

    @staticmethod
    def forward(
        ctx, rows: Tensor, weight: Tensor, targets: Tensor, softcap: float, vocab_size: int, copy: Tensor | None
    ) -> Tensor:
        needs_grad = any(ctx.needs_input_grad)
        used = _used_rows(rows, weight, vocab_size, copy)
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        grad_rows = torch.empty_like(rows) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        kernel = _gpu_kernel if rows.is_cuda else _blockwise_kernel
        for part in _pieces(rows, used.size(0)):
            z = rows[part] @ used.T  # (R, V)
            loss, grad_z = kernel(z, targets[part], softcap, vocab_size)
            total += loss
            if needs_grad:
                torch.mm(grad_z, used, out=grad_rows[part])
                add_product_(grad_weight[: used.size(0)], grad_z.T, rows[part])
        if needs_grad:
            ctx.save_for_backward(grad_rows, grad_weight)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor):
        grad_rows, grad_weight = ctx.saved_tensors
        scaled_weight = grad_weight.mul_(grad_total).to(ctx.weight_dtype)
        return grad_rows.mul_(grad_total.to(grad_rows.dtype)), scaled_weight, None, None, None, None


def loss_and_logit_gradient_(z: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """Summed loss of `softcap * tanh(z / softcap)` against targets, and its gradient with respect to z.

    z (R, V) is overwritten if it is float32. With c = softcap, s = sigmoid(2 z / c), the capped logits are 2 c s - c.
    Softmax ignores the shift by c, and 2 c s lies in [0, 2 c], so that exp needs no maximum subtracted first.
    d loss / d z = (p - onehot) * 4 s (1 - s). The sigmoid is six times faster than tanh on a CPU.
    """
    gate = z.float().mul_(2.0 / softcap).sigmoid_()  # in place for float32
    exp = (gate * (2.0 * softcap)).exp_()
    denominator = exp.sum(dim=1, keepdim=True)
    counts = (targets != IGNORE_INDEX).unsqueeze(1).float()
    index = targets.clamp(min=0).unsqueeze(1)
    losses = denominator.log() - 2.0 * softcap * gate.gather(1, index)
    difference = exp.mul_(4.0 * counts / denominator).scatter_add_(1, index, -4.0 * counts)
    slope = torch.addcmul(gate, gate, gate, value=-1.0, out=gate)
    return (losses * counts).sum(), slope.mul_(difference).to(z.dtype)


def _blockwise_kernel(z: Tensor, targets: Tensor, softcap: float, vocab_size: int) -> tuple[Tensor, Tensor]:
    """`loss_and_logit_gradient_` a few rows at a time, so that all its passes stay in the cache (2.4x on a CPU)."""
    total = torch.zeros((), device=z.device)
    step = max(1, CPU_BLOCK_ELEMENTS // vocab_size)
    for start in range(0, z.size(0), step):
        block = z[start : start + step]
        loss, gradient = loss_and_logit_gradient_(block, targets[start : start + step], softcap)
        total += loss
        if gradient.data_ptr() != block.data_ptr():
            block.copy_(gradient)
    return total, z


def _gpu_kernel(z: Tensor, targets: Tensor, softcap: float, vocab_size: int) -> tuple[Tensor, Tensor]:
    """`loss_and_logit_gradient_` of the first `vocab_size` columns, with 0 for the others, in one kernel of ours; where
    Triton is missing, by PyTorch's operations."""
    try:
        from nanochat.model.kernels import softcap_loss_
    except ImportError:
        loss, gradient = loss_and_logit_gradient_(z[:, :vocab_size], targets, softcap)
        return loss, torch.nn.functional.pad(gradient, (0, z.size(1) - vocab_size))
    return softcap_loss_(z, targets.contiguous(), vocab_size, softcap, IGNORE_INDEX).sum(), z

"""GPU kernels written in Triton, where PyTorch's own pass over memory more often than needed.

`softcap_loss_` turns logits into the gradient of their cross-entropy in place. Each logit is read twice, the second
time from the cache, and written once, and no float32 copy of the logits exists. On one H100, the compiled PyTorch
version of the same arithmetic took 87 ms of a 1.07 s training step (depth 12); the bytes it must move take about 34 ms.

Not here: the CPU path, and when a kernel is used (`loss.py`). Importing this file needs Triton, which comes with
PyTorch for Linux with CUDA. With TRITON_INTERPRET=1 the kernels run on CPU tensors, as the tests do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits that one step of a row's loop holds in registers
NUM_WARPS = 8


@triton.jit
def _softcap_loss_kernel(
    z_ptr, targets_ptr, losses_ptr, vocab_size, width, row_stride, softcap, IGNORE: tl.constexpr, BLOCK: tl.constexpr
):
    """One program a row. With gate = sigmoid(2 z / c), the capped logit is 2 c gate, shifted by a constant that softmax
    does not see. It lies between 0 and 2 c, so that exp needs no maximum subtracted first."""
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * row_stride
    target = tl.load(targets_ptr + row)
    counts = target != IGNORE
    target_z = tl.load(z_row + tl.where(counts, target, 0)).to(tl.float32)

    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, vocab_size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        is_logit = index < vocab_size
        z = tl.load(z_row + index, mask=is_logit, other=0.0).to(tl.float32)
        gate = 1.0 / (1.0 + tl.exp(-2.0 / softcap * z))
        sums += tl.where(is_logit, tl.exp(2.0 * softcap * gate), 0.0)
    denominator = tl.sum(sums, axis=0)

    target_gate = 1.0 / (1.0 + tl.exp(-2.0 / softcap * target_z))
    loss = tl.log(denominator) - 2.0 * softcap * target_gate
    tl.store(losses_ptr + row, tl.where(counts, loss, 0.0))

    scale = tl.where(counts, 4.0, 0.0)
    for start in range(0, width, BLOCK):
        index = start + tl.arange(0, BLOCK)
        is_column = index < width
        z = tl.load(z_row + index, mask=is_column, other=0.0).to(tl.float32)
        gate = 1.0 / (1.0 + tl.exp(-2.0 / softcap * z))
        probability = tl.exp(2.0 * softcap * gate) / denominator
        difference = probability - tl.where(index == target, 1.0, 0.0)
        gradient = tl.where(index < vocab_size, scale * difference * gate * (1.0 - gate), 0.0)
        tl.store(z_row + index, gradient.to(z_ptr.dtype.element_ty), mask=is_column)


@torch.library.custom_op("nanochat::softcap_loss_", mutates_args=("z",))
def softcap_loss_(z: Tensor, targets: Tensor, vocab_size: int, softcap: float, ignore_index: int) -> Tensor:
    """Cross-entropy, in nats, of each row of `softcap * tanh(z / softcap)`; z becomes the gradient of their sum.

    z (R, W) of any float dtype, contiguous along W, overwritten; its columns from `vocab_size` on are no classes, and
    become 0. targets (R,) int64, `ignore_index` where nothing is to be predicted (loss and gradient 0 there). Returns
    (R,) float32.
    """
    assert z.stride(1) == 1, z.stride()
    assert targets.is_contiguous(), targets.stride()
    losses = torch.empty(z.size(0), dtype=torch.float32, device=z.device)
    if z.size(0):
        block = min(BLOCK, triton.next_power_of_2(z.size(1)))
        _softcap_loss_kernel[(z.size(0),)](
            z, targets, losses, vocab_size, z.size(1), z.stride(0), softcap,
            IGNORE=ignore_index, BLOCK=block, num_warps=NUM_WARPS,
        )  # fmt: skip
    return losses


@softcap_loss_.register_fake
def _(z: Tensor, targets: Tensor, vocab_size: int, softcap: float, ignore_index: int) -> Tensor:
    return z.new_empty(z.size(0), dtype=torch.float32)

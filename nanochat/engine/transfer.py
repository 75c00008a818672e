"""Small arrays between host and device without one waiting for the other.

Memory that the device copies from or to by itself has to be pinned; from other memory, a copy first waits for all work
that the device was given before.
"""

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """`values` on the device, in the order of its other work."""
    tensor = torch.as_tensor(values)
    if device.type == "cuda" and torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Arriving:
    """Copies of tensors on their way to the host. `read` waits for these copies only, not for what the device is given
    after them."""

    def __init__(self, tensors: list[Tensor]):
        self._copies, self._event = tensors, None
        if tensors[0].is_cuda:
            self._copies = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors]
            for copy, tensor in zip(self._copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[list]:
        """The values of each tensor, as lists."""
        if self._event is not None:
            self._event.synchronize()
        return [copy.tolist() for copy in self._copies]

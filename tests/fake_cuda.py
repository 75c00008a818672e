"""What a GPU would refuse, found without one: code run on PyTorch's fake "cuda" device, its operations watched.

A fake tensor has a shape, a dtype and a device, and no data. Every operation on it is checked as on the real device,
and yields the device where its result would live.
"""

from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TRANSFERS = ("aten._to_copy.default", "aten.copy_.default", "aten.to.dtype_layout")  # the last in inference mode
NUMBERS = ("aten.fill_.Tensor",)  # how some releases write a number into a slice: it is an argument of the kernel
ALLOCATIONS = ("aten.empty", "aten.new_empty")
CREATIONS = ("aten.lift_fresh.default", "aten.detach.default", "aten.detach_.default", "aten._to_copy.default",
             "aten.empty.memory_format")  # fmt: skip


class _Watch(TorchDispatchMode):
    """Notes every operation that takes or gives a CPU tensor, but for making one and sending it to the GPU, and in
    `waits` every sending that holds up the host. (To read a value, or a size that values decide, would as well; that a
    fake tensor refuses.)"""

    def __init__(self):
        super().__init__()
        self.off_device: list[str] = []
        self.waits: list[str] = []
        self.launches: list[str] = []  # operations on the device but views and allocations
        self.num_operations = 0

    @property
    def mixed(self) -> list[str]:
        """Those of `off_device` that take or give tensors of both devices."""
        return [line for line in self.off_device if "cuda" in line]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.namespace == "prim" or str(function) in NUMBERS:  # prim: questions about a tensor, as its device
            return out
        self.num_operations += 1
        taken, given = (
            {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}
            for tree in ((args, kwargs), out)
        )
        name = str(function)
        is_view = (
            any(alias.alias_info is not None for alias in function._schema.returns) and not function._schema.is_mutable
        )
        if "cuda" in taken and not is_view and not name.startswith(ALLOCATIONS):
            self.launches.append(name)
        is_transfer = name in TRANSFERS and given == {"cuda"}
        if is_transfer and "cpu" in taken and not any(x is True for x in (*args, *(kwargs or {}).values())):
            self.waits.append(name)
        is_creation = name in CREATIONS and taken <= {"cpu"}
        if "cpu" in taken | given and not is_transfer and not is_creation:
            self.off_device.append(f"{name}: {sorted(taken)} -> {sorted(given)}")
        return out


@contextmanager
def fake_cuda():
    """Within it tensors may be made on "cuda"; gives the watch, whose `off_device` lists what would not stay there."""
    with FakeTensorMode(allow_non_fake_inputs=True), _Watch() as watch:
        yield watch

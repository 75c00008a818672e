"""Peak FLOP/s, memory with its bandwidth, and price of a GPU by its name, and the share of peak FLOP/s that a run
reaches (MFU).

A device that is not listed (any CPU, a laptop variant, a MIG slice) has no figures: the functions return None for it,
never a guess and never 0.

Sources: NVIDIA's data sheets of V100, T4, A10, A40, A100, L4, L40, L40S, H100, H200, H20, GH200, DGX B200, DGX B300
and RTX 6000 Ada, AWS's of the A10G, and the architecture white papers of GA102 (RTX 3090, A6000), AD102 (RTX 4090)
and GB202 (RTX 5090). All rates are dense: where a sheet gives the rate with 2:4 sparsity, half of it is listed here.
Consumer cards are listed with float32 accumulation, which is what PyTorch uses.
"""

import re
from dataclasses import dataclass

from nanochat.common import UserError

PRICES_AS_OF = "spring 2026"  # providers differ up to fourfold: an order of magnitude, not a quote


@dataclass(frozen=True)
class Device:
    """Data-sheet figures of a GPU: TFLOP/s by dtype, memory in GiB and its bandwidth in GB/s, dollars an hour.

    `float32` is the TF32 tensor-core rate from Ampere on, since `init_runtime` allows TF32 matrix products. Drivers
    report 1 to 8 % less than the data sheet's memory. None: no hardware unit for the dtype, or no published price.
    """

    float32: float
    bfloat16: float | None
    float16: float
    float8: float | None
    memory: int
    bandwidth: int
    gpu_hour_dollars: float | None = None


# Regular expressions for the whole name that CUDA reports, without "NVIDIA", "Tesla" and "GeForce".
DEVICES: dict[str, Device] = {
    r"V100-PCIE-16GB": Device(14.0, None, 112.0, None, 16, 900, 0.6),
    r"V100-PCIE-32GB": Device(14.0, None, 112.0, None, 32, 900, 0.6),
    r"V100-SXM[23]-16GB": Device(15.7, None, 125.0, None, 16, 900, 0.6),
    r"V100-SXM[23]-32GB": Device(15.7, None, 125.0, None, 32, 900, 0.6),
    r"V100S-PCIE-32GB": Device(16.4, None, 130.0, None, 32, 1134, 0.6),
    r"T4": Device(8.1, None, 65.0, None, 16, 320, 0.35),
    r"A100-(SXM4?|PCIE)-40GB": Device(156.0, 312.0, 312.0, None, 40, 1555, 1.3),
    r"A[18]00 80GB PCIe": Device(156.0, 312.0, 312.0, None, 80, 1935, 1.5),
    r"A[18]00-SXM4?-80GB": Device(156.0, 312.0, 312.0, None, 80, 2039, 1.5),
    r"A10": Device(62.5, 125.0, 125.0, None, 24, 600, 0.75),
    r"A10G": Device(35.0, 70.0, 70.0, None, 24, 600, 1.0),
    r"A40": Device(74.8, 149.7, 149.7, None, 48, 696, 0.5),
    r"RTX A6000": Device(77.4, 154.8, 154.8, None, 48, 768, 0.6),
    r"RTX 3090": Device(35.6, 71.0, 71.0, None, 24, 936, 0.3),
    r"RTX 3090 Ti": Device(40.0, 80.0, 80.0, None, 24, 1008, 0.3),
    r"L4": Device(60.5, 121.0, 121.0, 242.0, 24, 300, 0.5),
    r"L40": Device(90.5, 181.0, 181.0, 362.0, 48, 864, 0.9),
    r"L40S": Device(183.0, 362.0, 362.0, 733.0, 48, 864, 1.0),
    r"RTX 6000 Ada Generation": Device(182.1, 364.2, 364.2, 728.5, 48, 960, 0.8),
    r"RTX 4090": Device(82.6, 165.2, 165.2, 330.3, 24, 1008, 0.4),
    r"H[18]00 PCIe": Device(378.0, 756.0, 756.0, 1513.0, 80, 2000, 2.5),
    r"H100 NVL": Device(417.5, 835.5, 835.5, 1670.5, 94, 3900, 2.8),
    r"H100 80GB HBM3|H800": Device(494.5, 989.0, 989.0, 1979.0, 80, 3350, 3.0),
    r"H20": Device(74.0, 148.0, 148.0, 296.0, 96, 4000),
    r"H20-3e": Device(74.0, 148.0, 148.0, 296.0, 141, 4800),
    r"H200": Device(494.5, 989.0, 989.0, 1979.0, 141, 4800, 3.8),
    r"H200 NVL": Device(417.5, 835.5, 835.5, 1670.5, 141, 4800, 3.5),
    r"GH200 480GB": Device(494.5, 989.0, 989.0, 1979.0, 96, 4000, 2.0),
    r"B200": Device(1125.0, 2250.0, 2250.0, 4500.0, 180, 8000, 6.0),
    r"B300( SXM6 AC)?": Device(1125.0, 2250.0, 2250.0, 4500.0, 288, 8000, 7.5),
    r"RTX 5090": Device(104.8, 209.5, 209.5, 419.0, 32, 1792, 0.8),
}

SHORT_NAMES = {"V100": "V100-SXM2-32GB", "A100": "A100-SXM4-80GB", "H100": "H100 80GB HBM3", "GH200": "GH200 480GB"}


def find_device(device_name: str) -> Device | None:
    """The entry for a name as given by `torch.cuda.get_device_name`; None if it is not listed."""
    name = " ".join(re.sub(r"\b(NVIDIA|Tesla|GeForce)\b", "", device_name).split())
    return next((device for pattern, device in DEVICES.items() if re.fullmatch(pattern, name)), None)


def full_name(name: str) -> str:
    """`name`, with the keys of `SHORT_NAMES` expanded. Raises `UserError` for a GPU that is not listed."""
    name = SHORT_NAMES.get(name, name)
    if find_device(name) is None:
        raise UserError(f"the GPU {name!r} is not known; take one like H100, H200, A100 or 'RTX 4090' (hardware.py)")
    return name


def peak_flops(device_name: str, dtype: object) -> float | None:
    """Peak dense FLOP/s of one device; `dtype` is a `torch.dtype` or its name, all float8 types being the same.

    None for a device that is not listed and for a dtype it has no unit for.
    """
    name = "float8" if "float8" in str(dtype) else str(dtype).removeprefix("torch.")
    is_rate = name in ("float32", "bfloat16", "float16", "float8")
    tflops = getattr(find_device(device_name), name, None) if is_rate else None
    return None if tflops is None else tflops * 1e12


def memory_bytes(device_name: str) -> int | None:
    """Memory of one device according to its data sheet; None if it is not listed."""
    device = find_device(device_name)
    return None if device is None else device.memory << 30


def peak_bandwidth(device_name: str) -> float | None:
    """Bytes per second that one device reads from its memory at most, by its data sheet; None if it is not listed."""
    device = find_device(device_name)
    return None if device is None else device.bandwidth * 1e9


def gpu_hour_dollars(device_name: str) -> float | None:
    """Rough on-demand price of one GPU-hour as of `PRICES_AS_OF`; None if it is not known."""
    return getattr(find_device(device_name), "gpu_hour_dollars", None)


def mfu(
    flops_per_token: float, tokens_per_second: float, device_name: str, dtype: object, world_size: int = 1
) -> float | None:
    """Model FLOPs utilisation, 0 to 1: the share of all devices' peak that is spent on the model's own FLOPs.

    `flops_per_token` counts forward and backward pass without recomputation, `tokens_per_second` the tokens of all
    ranks. None if no peak is known for the device and `dtype`. Source: arXiv 2204.02311, appendix B.
    """
    peak = peak_flops(device_name, dtype)
    return None if peak is None else flops_per_token * tokens_per_second / (peak * world_size)

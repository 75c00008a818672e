"""What a GPU can do at best, by its name: peak FLOP/s, bandwidth, memory, price; and shares of peak.

A device that is not in the table (every CPU, a laptop variant, a MIG slice) has no peak, so it has no share of peak
either: the functions return None for it, never a guess and never 0.

Sources: NVIDIA's data sheets of V100, T4, A10, A40, A100, L4, L40, L40S, H100, H200, H20, GH200, DGX B200, DGX B300
and RTX 6000 Ada, AWS's of the A10G, and the architecture white papers of GA102 (RTX 3090, A6000), AD102 (RTX 4090)
and GB202 (RTX 5090). All figures are dense: where a sheet prints the rate with 2:4 sparsity, half of it stands here.
Consumer cards count with accumulation in float32, which is what PyTorch uses.
"""

import re
from dataclasses import dataclass

from nanochat.common import UserError

PRICES_AS_OF = "spring 2026"  # lists of different providers differ up to fourfold: an order of magnitude, no quote


@dataclass(frozen=True)
class Device:
    """Data-sheet figures of one kind of GPU: rates in TFLOP/s by dtype, bandwidth in GB/s, memory, dollars an hour.

    `float32` is the TF32 tensor-core rate from Ampere on, as `init_runtime` lets products run in TF32. `memory` is the
    sheet's number of gigabytes, which are GiB, of which drivers report 1 to 8 % less. None: the hardware has no unit
    for the dtype, or nobody publishes a price.
    """

    float32: float
    bfloat16: float | None
    float16: float
    float8: float | None
    bandwidth: float
    memory: int
    gpu_hour_dollars: float | None = None


# Whole names as CUDA reports them, without "NVIDIA", "Tesla" and "GeForce", to what they are.
DEVICES: dict[str, Device] = {
    r"V100-PCIE-16GB": Device(14.0, None, 112.0, None, 900, 16, 0.6),
    r"V100-PCIE-32GB": Device(14.0, None, 112.0, None, 900, 32, 0.6),
    r"V100-SXM[23]-16GB": Device(15.7, None, 125.0, None, 900, 16, 0.6),
    r"V100-SXM[23]-32GB": Device(15.7, None, 125.0, None, 900, 32, 0.6),
    r"V100S-PCIE-32GB": Device(16.4, None, 130.0, None, 1134, 32, 0.6),
    r"T4": Device(8.1, None, 65.0, None, 300, 16, 0.35),
    r"A100-(SXM4?|PCIE)-40GB": Device(156.0, 312.0, 312.0, None, 1555, 40, 1.3),
    r"A[18]00 80GB PCIe": Device(156.0, 312.0, 312.0, None, 1935, 80, 1.5),
    r"A[18]00-SXM4?-80GB": Device(156.0, 312.0, 312.0, None, 2039, 80, 1.5),
    r"A10": Device(62.5, 125.0, 125.0, None, 600, 24, 0.75),
    r"A10G": Device(35.0, 70.0, 70.0, None, 600, 24, 1.0),
    r"A40": Device(74.8, 149.7, 149.7, None, 696, 48, 0.5),
    r"RTX A6000": Device(77.4, 154.8, 154.8, None, 768, 48, 0.6),
    r"RTX 3090": Device(35.6, 71.0, 71.0, None, 936, 24, 0.3),
    r"RTX 3090 Ti": Device(40.0, 80.0, 80.0, None, 1008, 24, 0.3),
    r"L4": Device(60.5, 121.0, 121.0, 242.0, 300, 24, 0.5),
    r"L40": Device(90.5, 181.0, 181.0, 362.0, 864, 48, 0.9),
    r"L40S": Device(183.0, 362.0, 362.0, 733.0, 864, 48, 1.0),
    r"RTX 6000 Ada Generation": Device(182.1, 364.2, 364.2, 728.5, 960, 48, 0.8),
    r"RTX 4090": Device(82.6, 165.2, 165.2, 330.3, 1008, 24, 0.4),
    r"H[18]00 PCIe": Device(378.0, 756.0, 756.0, 1513.0, 2000, 80, 2.5),
    r"H100 NVL": Device(417.5, 835.5, 835.5, 1670.5, 3900, 94, 2.8),
    r"H100 80GB HBM3|H800": Device(494.5, 989.0, 989.0, 1979.0, 3350, 80, 3.0),
    r"H20": Device(74.0, 148.0, 148.0, 296.0, 4000, 96),
    r"H20-3e": Device(74.0, 148.0, 148.0, 296.0, 4000, 141),
    r"H200": Device(494.5, 989.0, 989.0, 1979.0, 4800, 141, 3.8),
    r"H200 NVL": Device(417.5, 835.5, 835.5, 1670.5, 4800, 141, 3.5),
    r"GH200 480GB": Device(494.5, 989.0, 989.0, 1979.0, 4000, 96, 2.0),
    r"B200": Device(1125.0, 2250.0, 2250.0, 4500.0, 8000, 180, 6.0),
    r"B300( SXM6 AC)?": Device(1125.0, 2250.0, 2250.0, 4500.0, 8000, 288, 7.5),
    r"RTX 5090": Device(104.8, 209.5, 209.5, 419.0, 1792, 32, 0.8),
}

SHORT_NAMES = {"V100": "V100-SXM2-32GB", "A100": "A100-SXM4-80GB", "H100": "H100 80GB HBM3", "GH200": "GH200 480GB"}


def find_device(device_name: str) -> Device | None:
    """The table's entry for a name as `torch.cuda.get_device_name` gives it; None for one that is not listed."""
    name = re.sub(r"\b(NVIDIA|Tesla|GeForce)\b", "", device_name).strip()
    name = re.sub(r"\s+", " ", name)
    return next((device for pattern, device in DEVICES.items() if re.fullmatch(pattern, name)), None)


def full_name(name: str) -> str:
    """`name`, or what CUDA calls the usual kind of that when it is one of `SHORT_NAMES`.

    Raises `UserError` for a GPU that is not listed.
    """
    name = SHORT_NAMES.get(name, name)
    if find_device(name) is None:
        raise UserError(f"the GPU {name!r} is not known; take one like H100, H200, A100 or 'RTX 4090' (hardware.py)")
    return name


def peak_flops(device_name: str, dtype: object) -> float | None:
    """Peak dense FLOP/s of one device; `dtype` is a `torch.dtype` or its name, any float8 type counting as float8.

    None for a device that is not listed and for a dtype it has no unit for.
    """
    device = find_device(device_name)
    name = str(dtype).removeprefix("torch.")
    name = "float8" if name.startswith("float8") else name
    tflops = getattr(device, name, None) if name in ("float32", "bfloat16", "float16", "float8") else None
    return None if tflops is None else tflops * 1e12


def peak_bandwidth(device_name: str) -> float | None:
    """Peak memory bandwidth of one device in bytes a second; None for a device that is not listed."""
    device = find_device(device_name)
    return None if device is None else device.bandwidth * 1e9


def memory_bytes(device_name: str) -> int | None:
    """Memory of one device by its data sheet; None for a device that is not listed."""
    device = find_device(device_name)
    return None if device is None else device.memory << 30


def gpu_hour_dollars(device_name: str) -> float | None:
    """What an hour of one such GPU costs on demand, roughly, at `PRICES_AS_OF`; None where no price is known."""
    device = find_device(device_name)
    return None if device is None else device.gpu_hour_dollars


def mfu(
    flops_per_token: float, tokens_per_second: float, device_name: str, dtype: object, world_size: int = 1
) -> float | None:
    """Model FLOPs utilisation: the share of the peak of all devices, 0 to 1, that a run turns into model FLOPs.

    `flops_per_token` counts forward and backward of the model alone (no recomputation), `tokens_per_second` the
    tokens of all ranks together. None where the device has no known peak for `dtype` (arXiv 2204.02311, appendix B).
    """
    peak = peak_flops(device_name, dtype)
    return None if peak is None else flops_per_token * tokens_per_second / (peak * world_size)


def mbu(bytes_per_step: float, steps_per_second: float, device_name: str, world_size: int = 1) -> float | None:
    """Model bandwidth utilisation: the share of peak memory bandwidth, 0 to 1, that decoding reaches.

    `bytes_per_step` is what one decoding step has to read on all devices together: the weights once and the cache
    of every row. None where the device has no known bandwidth.
    """
    peak = peak_bandwidth(device_name)
    return None if peak is None else bytes_per_step * steps_per_second / (peak * world_size)

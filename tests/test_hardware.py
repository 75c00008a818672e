"""Peaks by device name, and the share of peak computed from them."""

import pytest
import torch

from nanochat import hardware
from nanochat.common import UserError
from nanochat.hardware import DEVICES, SHORT_NAMES, find_device, full_name, memory_bytes, mfu, peak_flops

TFLOPS = {  # dense, bfloat16
    "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H100 NVL": 835.5, "NVIDIA H200": 989,
    "NVIDIA H200 NVL": 835.5, "NVIDIA B200": 2250, "NVIDIA A100-SXM4-80GB": 312, "A100-SXM4-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312, "NVIDIA L40S": 362, "NVIDIA L4": 121, "NVIDIA A10": 125, "NVIDIA A10G": 70,
    "NVIDIA RTX A6000": 154.8, "NVIDIA GeForce RTX 3090": 71, "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5090": 209.5,
}  # fmt: skip
NOT_LISTED = [
    "", "cpu", "AMD EPYC 7763 64-Core Processor", "Apple M3 Max", "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H1000",
]  # fmt: skip


@pytest.mark.parametrize(("name", "tflops"), TFLOPS.items())
def test_bf16_peak_is_that_of_the_data_sheet(name, tflops):
    assert peak_flops(name, torch.bfloat16) == pytest.approx(tflops * 1e12)


def test_bandwidth_is_that_of_the_data_sheet_and_grows_with_the_generation():
    peaks = [hardware.peak_bandwidth(f"NVIDIA {name}") for name in ("A100-SXM4-80GB", "H100 80GB HBM3", "H200", "B200")]
    assert peaks == [2039e9, 3350e9, 4800e9, 8000e9]


def test_memory_is_that_of_the_data_sheet():
    assert memory_bytes("NVIDIA H100 80GB HBM3") == 80 * 2**30
    assert memory_bytes("Tesla V100-SXM2-16GB") == memory_bytes("Tesla V100-SXM2-32GB") / 2 == 16 * 2**30


@pytest.mark.parametrize("name", NOT_LISTED)
def test_a_device_that_is_not_listed_has_no_figures_and_no_utilisation(name):
    assert find_device(name) is None
    assert peak_flops(name, "bfloat16") is None
    assert memory_bytes(name) is None
    assert hardware.gpu_hour_dollars(name) is hardware.peak_bandwidth(name) is None
    assert mfu(1e9, 1e5, name, "bfloat16") is None


def test_peaks_are_by_name_or_torch_type_of_the_dtype_and_only_where_the_hardware_has_one():
    assert peak_flops("NVIDIA H200", torch.float8_e5m2) == peak_flops("NVIDIA H200", "float8") == 1979e12
    assert peak_flops("NVIDIA H200", torch.float32) == peak_flops("NVIDIA H200", "float32") == 494.5e12
    assert peak_flops("Tesla T4", "float16") == 65e12
    for name, dtype in (("Tesla T4", "bfloat16"), ("NVIDIA A100-SXM4-80GB", torch.float8_e4m3fn)):
        assert peak_flops(name, dtype) is None
    assert peak_flops("NVIDIA H200", "int8") is peak_flops("NVIDIA H200", "memory") is None


def test_every_entry_orders_its_rates_and_every_name_matches_one_entry():
    for device in DEVICES.values():
        assert device.float32 < device.float16 < (device.float8 or float("inf"))
        assert device.bfloat16 in (None, device.float16)
    simple_names = [pattern for pattern in DEVICES if pattern.replace(" ", "").isalnum()]
    assert all(find_device(f"NVIDIA {name}") is DEVICES[name] for name in simple_names)


def test_gpus_are_known_by_short_names_too():
    assert all(full_name(short) == name and find_device(name) for short, name in SHORT_NAMES.items())
    assert full_name("RTX 4090") == "RTX 4090"
    with pytest.raises(UserError, match=r"'H1' is not known.*H100"):
        full_name("H1")


def test_mfu_of_a_worked_example_on_one_device_or_eight():
    # d20 of the performance notes: 2.793 GF/token, 177 K tokens/s on one H200 is half of 989 TF.
    for world_size in (1, 8):
        share = mfu(2.793e9, world_size * 177e3, "NVIDIA H200", torch.bfloat16, world_size=world_size)
        assert share == pytest.approx(0.5, rel=1e-3)

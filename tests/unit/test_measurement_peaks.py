"""What a device can do at most, by the name that CUDA has for it."""

import pytest

from ops_worker.measurement.peaks import peak_flops_per_s


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5),
        ("NVIDIA H100 80GB HBM3", "float32", 67),
        ("NVIDIA H100 PCIe", "float16", 756.5),
        ("NVIDIA H200 NVL", "bfloat16", 835.5),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("A100-PCIE-40GB", "float32", 19.5),
        ("NVIDIA A100 80GB PCIe", "float16", 312),
        ("NVIDIA L40S", "float16", 362.05),
        ("NVIDIA L4", "float16", 121),
        ("Tesla V100-SXM2-32GB", "float16", 125),
        ("Tesla T4", "float32", 8.1),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
    ],
)
def test_the_peak_is_dense_and_of_the_precision(name: str, precision: str, tera: float) -> None:
    peak, source = peak_flops_per_s(name, precision)
    assert peak == pytest.approx(tera * 1e12)
    assert f"dense {precision}" in source


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",  # a seventh of one
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM-64GB",
        "AMD Instinct MI300X",
    ],
)
def test_a_name_that_is_only_like_one_has_no_peak(name: str) -> None:
    assert peak_flops_per_s(name, "float16") == (None, f"the peak of {name} is not known")


@pytest.mark.parametrize("name", ["Tesla V100-SXM2-16GB", "Tesla T4"])
def test_a_device_without_bfloat16_has_no_peak_of_it(name: str) -> None:
    assert peak_flops_per_s(name, "bfloat16") == (None, f"{name} has no bfloat16 of its own")

"""What a device can do at most, by its name: dense FLOP/s of matrix products, from NVIDIA's own documents.

Half precisions are those of the tensor cores without sparsity, accumulated in float32 as torch does (a GeForce is twice
as fast with float16 sums, which nobody asks for); float32 is that of the CUDA cores, without TF32. Where a document
gives the figure with sparsity alone, it is halved.
"""

import re
from typing import NamedTuple


class Peak(NamedTuple):
    """In TFLOP/s. `half` is of float16, and of bfloat16 as well where `bfloat16` does not say that there is none."""

    name: str  # a regular expression for what CUDA calls the device, after "NVIDIA" or "Tesla"
    float32: float
    half: float
    document: str
    bfloat16: bool = True


PEAKS = [
    # resources.nvidia.com/en-us-blackwell-architecture/datasheet, HGX B200: 36 PFLOP/s of FP16 with sparsity and 600
    # TFLOP/s of FP32 for eight.
    Peak(r"B200", 75, 2250, "HGX B200 datasheet"),
    # The same document, GB200 NVL72: 10 PFLOP/s of FP16 with sparsity and 160 TFLOP/s of FP32 for two.
    Peak(r"GB200", 80, 2500, "GB200 NVL72 datasheet"),
    # resources.nvidia.com/en-us-data-center-overview/hpc-datasheet-sc23-h200: 1979 (SXM) and 1671 (NVL) with sparsity.
    Peak(r"H200", 67, 989.5, "H200 datasheet"),
    Peak(r"H200 NVL", 60, 835.5, "H200 datasheet"),
    # resources.nvidia.com/en-us-grace-cpu/grace-hopper-superchip: 1979 with sparsity.
    Peak(r"GH200 (480GB|120GB|144G HBM3e)", 67, 989.5, "GH200 datasheet"),
    # resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet: 1979 (SXM), 1513 (PCIe), 1671 (NVL), with
    # sparsity.
    Peak(r"H100 80GB HBM3", 67, 989.5, "H100 datasheet"),
    Peak(r"H100 PCIe", 51, 756.5, "H100 datasheet"),
    Peak(r"H100 NVL", 60, 835.5, "H100 datasheet"),
    # nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
    Peak(r"A100[- ](SXM4?-[48]0GB|PCIE-[48]0GB|80GB PCIe)", 19.5, 312, "A100 datasheet"),
    # nvidia.com/content/dam/en-zz/Solutions/data-center/products/a30-gpu/pdf/a30-datasheet.pdf
    Peak(r"A30", 10.3, 165, "A30 datasheet"),
    # images.nvidia.com/content/Solutions/data-center/a40/nvidia-a40-datasheet.pdf
    Peak(r"A40", 37.4, 149.7, "A40 datasheet"),
    # nvidia.com/content/dam/en-zz/Solutions/Data-Center/a10/pdf/a10-datasheet.pdf
    Peak(r"A10", 31.2, 125, "A10 datasheet"),
    # nvidia.com/content/dam/en-zz/Solutions/data-center/a2/pdf/a2-datasheet.pdf
    Peak(r"A2", 4.5, 18, "A2 datasheet"),
    # resources.nvidia.com/en-us-data-center-overview/l4-gpu-datasheet: 242 with sparsity.
    Peak(r"L4", 30.3, 121, "L4 datasheet"),
    # images.nvidia.com/content/Solutions/data-center/vgpu-L40-datasheet.pdf
    Peak(r"L40", 90.5, 181.05, "L40 datasheet"),
    # resources.nvidia.com/en-us-l40s/l40s-datasheet-28413
    Peak(r"L40S", 91.6, 362.05, "L40S datasheet"),
    # images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf
    Peak(r"V100-SXM2-(16|32)GB", 15.7, 125, "V100 datasheet", bfloat16=False),
    Peak(r"V100-PCIE-(16|32)GB", 14, 112, "V100 datasheet", bfloat16=False),
    Peak(r"V100S-PCIE-32GB", 16.4, 130, "V100 datasheet", bfloat16=False),
    # nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf
    Peak(r"T4", 8.1, 65, "T4 datasheet", bfloat16=False),
    # nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf, appendices A and B
    Peak(r"RTX A6000", 38.7, 154.8, "GA102 whitepaper"),
    Peak(r"GeForce RTX 3090", 35.6, 71, "GA102 whitepaper"),
    # images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf, appendix A
    Peak(r"GeForce RTX 4090", 82.6, 165.2, "Ada whitepaper"),
    # images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf, appendix A
    Peak(r"GeForce RTX 5090", 104.8, 209.5, "RTX Blackwell whitepaper"),
]


def peak_flops_per_s(device_name: str, precision: str) -> tuple[float | None, str]:
    """With its source; or null, and why. A slice of a GPU (MIG) has a name of its own, hence no peak."""
    called = re.sub(r"^(NVIDIA|Tesla) ", "", device_name)
    found = next((peak for peak in PEAKS if re.fullmatch(peak.name, called)), None)
    if found is None:
        return None, f"the peak of {device_name} is not known"
    if precision == "bfloat16" and not found.bfloat16:
        return None, f"{device_name} has no bfloat16 of its own"
    tera = found.float32 if precision == "float32" else found.half
    return tera * 1e12, f"{found.document}, dense {precision}"

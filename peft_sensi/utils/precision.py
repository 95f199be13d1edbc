"""Whether training under bfloat16 autocast is faster than in float32 on a device."""

from __future__ import annotations

import functools
import platform
import time

import torch


FASTER = 1.3  # autocast also converts weights and activations, so a slightly faster matmul does not pay
SHAPE = (128, 256, 256)  # of the timed matmul: 0.2 ms in float32, and 8 ms in bfloat16 without the instructions
X86 = ("x86_64", "amd64", "i386", "i686")
INSTRUCTIONS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # functions of `torch.cpu`


def bf16_pays(device: torch.device | str | None = None) -> bool:
    """Whether training under bfloat16 autocast is faster than in float32 on this device.

    - CUDA: from compute capability 8.0 on (Ampere), which has bfloat16 tensor cores.
    - CPU: not on an x86 CPU without AVX512-BF16 and AMX. On any other CPU, a small matmul is timed once (a few
      milliseconds), because the instructions do not help if the build or the settings of PyTorch do not use them.
    - All other devices: no, because it was not measured there.

    Without a device, the answer is for the accelerator that PyTorch finds, or else for the CPU.
    """
    if device is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = "cpu" if found is None else found
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if kind == "cpu":
        return _has_instructions() and bf16_speedup() >= FASTER
    return False


def _has_instructions() -> bool:
    """Whether the CPU may have instructions for bfloat16. Where PyTorch cannot say, the answer is yes."""
    if platform.machine().lower() not in X86:
        return True
    # These functions are private: a version of PyTorch without them cannot say.
    return any(getattr(torch.cpu, name, lambda: True)() for name in INSTRUCTIONS)


@functools.cache
def bf16_speedup() -> float:
    """How many times as fast a small matmul is on the CPU in bfloat16 as in float32. The best of five turns counts."""
    rows, inner, columns = SHAPE
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        factors = {
            dtype: [torch.ones(size, dtype=dtype, device="cpu") for size in ((rows, inner), (inner, columns))]
            for dtype in best
        }
        for _ in range(5):
            for dtype, (left, right) in factors.items():
                start = time.perf_counter()
                left @ right
                best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.float32] / best[torch.bfloat16]

"""The rounding of products: which low precisions a device multiplies faster, and whether float32 is
really float32.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


def fast_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """The dtypes that the hardware multiplies faster than float32, in the order in which to try
    them.

    Tensor cores take float16 and bfloat16 at one rate, and float16 leaves fewer candidates; where
    it overflows, bfloat16 does not.
    """
    if device.type == "cuda":
        return (
            (torch.float16, torch.bfloat16)
            if torch.cuda.get_device_capability(device) >= (8, 0)
            else ()
        )
    return (torch.bfloat16,) if device.type == "cpu" and _cpu_multiplies_bfloat16() else ()


@cache
def _cpu_multiplies_bfloat16() -> bool:
    # oneDNN takes bfloat16 wherever there is AVX-512, and multiplies it faster only with
    # instructions of its own: ask the clock.
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
    except AttributeError:  # torch without oneDNN
        return False
    from time import perf_counter

    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(512, 512, dtype=dtype, device="cpu")
        x @ x
        began = perf_counter()
        for _ in range(4):
            x @ x
        times[dtype] = perf_counter() - began
    return times[torch.bfloat16] < 0.7 * times[torch.float32]


def float32_is_exact() -> bool:
    """Whether torch multiplies float32 as float32. The user may have let it round to TF32 or
    bfloat16 first, and then no bound holds.
    """
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # one of torch's newer settings, by backend, is not the default
        return False
    # oneDNN's own, which torch does not see.
    mode = os.environ.get(
        "ONEDNN_DEFAULT_FPMATH_MODE", os.environ.get("DNNL_DEFAULT_FPMATH_MODE", "strict")
    )
    return exact and mode.lower() == "strict"


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of float32 matrices (n, d) and (d, m) with float32's rounding, even if the process lets
    torch round more: float32 (n, m).
    """
    return a @ b if float32_is_exact() else (a.double() @ b.double()).float()


# Whether cuBLAS may round partial sums, by the dtype of a product; and whether it may keep them in
# float16 all along.
_ROUNDING = (
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)

_rounding_lock = threading.Lock()

_blocks: set[object] = set()  # that are open

_before: dict[str, bool | tuple[bool, bool]] = {}


@contextmanager
def sums_in_float32() -> Iterator[None]:
    """Within the block cuBLAS keeps the partial sums of bfloat16 and float16 products in float32;
    torch's default lets it round them.

    The settings are the process's: the last thread to leave the block restores them.
    """
    settings, block = torch.backends.cuda.matmul, object()
    with _rounding_lock:
        if not _blocks:
            for name in _ROUNDING:
                # Set together in newer versions of torch.
                split = getattr(settings, f"{name}_split_k", None)
                _before[name] = (
                    getattr(settings, name) if split is None else (getattr(settings, name), split)
                )
                setattr(settings, name, False if split is None else (False, split))
        _blocks.add(block)
    try:
        yield
    finally:
        with _rounding_lock:
            _blocks.remove(block)
            if not _blocks:
                for name, before in _before.items():
                    setattr(settings, name, before)

"""The tests of this folder under any of torch's process-wide settings: `TORCH_SETTING=bfloat16
pytest tests/numerics`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import pytest
import torch

T = TypeVar("T")


@contextmanager
def _set(setter: Callable[[T], object], value: T, before: T) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(before)


@contextmanager
def _precision(value: str, by_backend: str | None = None) -> Iterator[None]:
    """Products of float32 to this precision; each backend keeps it beside the whole, and is put
    back by itself.
    """
    owners = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]  # torch declares no matmul of mkldnn's
    before = torch.get_float32_matmul_precision(), [owner.fp32_precision for owner in owners]
    torch.set_float32_matmul_precision(value)
    for owner in owners if by_backend is not None else ():
        owner.fp32_precision = by_backend
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        for owner, each in zip(owners, before[1], strict=True):
            owner.fp32_precision = each


SETTINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "float64": lambda: _set(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: _set(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "deterministic": lambda: _set(torch.use_deterministic_algorithms, True, False),
    "medium": lambda: _precision("medium"),
    "1-thread": lambda: _set(torch.set_num_threads, 1, torch.get_num_threads()),
    "4-threads": lambda: _set(torch.set_num_threads, 4, torch.get_num_threads()),
}
"""What a process may set, by name: a context each."""


@pytest.fixture(autouse=True)
def torch_setting() -> Iterator[None]:
    """Each test under the setting that the environment names; without a name, as torch comes."""
    name = os.environ.get("TORCH_SETTING")
    if name is None:
        yield
        return
    with SETTINGS[name]():
        yield


@pytest.fixture
def exact_float32() -> Iterator[None]:
    """For tests of what is done where products of float32 are exact, whatever the setting."""
    with _precision("highest", by_backend="none"):
        yield


@pytest.fixture(params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> AbstractContextManager[object]:
    """Each setting in turn, to be entered by the test."""
    return SETTINGS[request.param]()

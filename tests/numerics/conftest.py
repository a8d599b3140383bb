"""The tests of this folder under any of torch's process-wide settings: `TORCH_SETTING=bfloat16 pytest tests/numerics`."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch


@contextmanager
def _set(setter: Callable[[object], object], value: object, before: object) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(before)


SETTINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "float64": lambda: _set(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: _set(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "deterministic": lambda: _set(torch.use_deterministic_algorithms, True, False),
    "medium": lambda: _set(torch.set_float32_matmul_precision, "medium", "highest"),
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
    with _set(torch.set_float32_matmul_precision, "highest", torch.get_float32_matmul_precision()):
        yield


@pytest.fixture(params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> AbstractContextManager[object]:
    """Each setting in turn, to be entered by the test."""
    return SETTINGS[request.param]()

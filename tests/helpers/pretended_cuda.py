"""A GPU where there is none: tensors that say they are on cuda:0, whose values are on the CPU.

What mixes devices fails as on a GPU, and what a GPU would do is counted: launches, waits of the
host, float atomics. What it computes are the CPU's numbers. It has no Triton, and no time. It is
installed into a whole process, so into one of its own:

    python tests/helpers/pretended_cuda.py -m kedro run --params=device:cuda
    PYTHONPATH=tests/helpers pytest -p pretended_cuda -m gpu tests/numerics
"""

from __future__ import annotations

import runpy
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
"""What tensors say."""
_INNER = torch.device("privateuseone", 0)
"""What torch is told."""
_ROOTS = ("assay", "tests", "benchmarks")

# Operations for whose result, or its shape, the host waits: so often.
_WAITS = {
    **dict.fromkeys(
        (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "equal",
            "is_nonzero",
            "unique_consecutive",
        ),
        1,
    ),
    **dict.fromkeys(("linalg_eigh", "_linalg_eigh", "histc", "isin"), 1),
    **dict.fromkeys(("bincount", "_unique2", "unique_dim", "unique_dim_consecutive"), 2),
}
_ATOMICS = ("scatter_add", "index_add", "scatter_reduce", "put", "index_put", "_index_put_impl")
# Of these a tensor on the CPU is the source or the destination by right.
_COPIES = ("copy_", "_to_copy", "_copy_from", "_copy_from_and_resize", "copy")
_NUMBERS = ("where", "fill_", "masked_fill", "masked_fill_", "lerp")
_INDEXED = ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_")


class MixedDevicesError(RuntimeError):
    """Tensors on both devices, where a GPU wants them on one."""


class Counts:
    """What was done so far: `launches`, and by place and kind `waits` and `atomics`.

    The latter are sums of floats, whose order changes from run to run.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Begin again at 0."""
        self.launches = 0
        self.waits: Counter[str] = Counter()
        self.atomics: Counter[str] = Counter()

    def add(self, counter: Counter[str], what: str, times: int = 1) -> None:
        """Count something at the line of the project that asked for it."""
        if times:
            with self._lock:
                counter[f"{_place()} {what}"] += times


def _place() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.name != Path(__file__).name and any(root in path.parts for root in _ROOTS):
            return f"{path.name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


COUNTS = Counts()


class Pretended(Tensor):
    """A tensor on the pretended device, of the CPU tensor `values`."""

    values: Tensor  # type: ignore[assignment]  # in the place of a sparse tensor's method
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's own subclasses do

    @staticmethod
    def __new__(cls, values: Tensor) -> Pretended:
        made: Pretended = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=_INNER,
        )
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # which torch declares without its class
        cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operation: on tensors of the CPU as it is, on others checked, counted, and done with
    their values.
    """
    name = func._schema.name.split("::")[1]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
    target = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    plain = {
        key: value for key, value in kwargs.items() if key not in ("pin_memory", "non_blocking")
    }
    if target is not None:
        plain["device"] = torch.device("cpu")
    if not ours and target != _INNER.type:
        return func(*args, **plain)
    _check(func, name, args, tensors)
    _count(func, name, args, kwargs, ours)
    found = func(*tree_map(_values, args), **tree_map(_values, plain))
    if name == "_to_copy" and target == "cpu":
        return found.clone() if found is args[0].values else found
    if name == "copy_":
        return args[0]
    known = {id(tensor.values): tensor for tensor in ours}
    return tree_map(lambda each: _wrapped(each, known), found)


def _values(each: Any) -> Any:
    return each.values if isinstance(each, Pretended) else each


def _wrapped(each: Any, known: dict[int, Pretended]) -> Any:
    if not isinstance(each, Tensor):
        return each
    return known[id(each)] if id(each) in known else Pretended(each)


def _check(func: Any, name: str, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    """What CUDA takes from the CPU: indices, numbers in arithmetic, and what is copied."""
    others = [tensor for tensor in tensors if not isinstance(tensor, Pretended)]
    if not others or len(others) == len(tensors) or name in _COPIES:
        return
    if name in _INDEXED:
        right = isinstance(args[0], Pretended) and (
            len(args) < 3 or isinstance(args[2], Pretended) or args[2].ndim == 0
        )
    else:
        right = all(tensor.ndim == 0 for tensor in others) and (
            torch.Tag.pointwise in func.tags or name in _NUMBERS
        )
    if not right:
        shown = ", ".join(
            f"{'cuda' if isinstance(each, Pretended) else 'cpu'}{tuple(each.shape)}"
            for each in tensors
        )
        raise MixedDevicesError(f"{func} of {shown} at {_place()}")


def _count(
    func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], ours: list[Pretended]
) -> None:
    if not func.is_view and name not in ("detach", "alias", "lift_fresh", "_unsafe_view"):
        COUNTS.launches += 1
    stem = name.rstrip("_")
    if name in _INDEXED:
        waits = _waits_for_indices(args)
    elif name in _COPIES:
        waits = _waits_for_copy(name, args, kwargs, bool(ours))
    elif stem == "segment_reduce":
        waits = 0 if kwargs.get("unsafe") else 2
    elif stem == "repeat_interleave":
        waits = int(kwargs.get("output_size") is None)
    else:
        waits = _WAITS.get(name, 0)
    COUNTS.add(COUNTS.waits, name, waits)
    extreme = {"amin", "amax"} & {arg for arg in args if isinstance(arg, str)}
    accumulates = "index_put" not in stem or any(args[3:4])
    if (
        stem in _ATOMICS
        and accumulates
        and not extreme
        and any(each.is_floating_point() for each in ours)
    ):
        COUNTS.add(COUNTS.atomics, name)


def _waits_for_indices(args: tuple[Any, ...]) -> int:
    """A mask has to be counted, and an index on the CPU to be copied; a fill with one number takes
    the mask as it is.
    """
    indices = [index for index in args[1] if isinstance(index, Tensor)]
    filled = len(args) > 2 and args[2].numel() == 1 and not any(args[3:4])
    masks = 0 if filled else sum(index.dtype in (torch.bool, torch.uint8) for index in indices)
    return masks + sum(not isinstance(index, Pretended) for index in indices)


def _waits_for_copy(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], from_us: bool) -> int:
    """Between the devices, but where the copy is only queued, from or into pinned memory: then an
    event may be waited for.
    """
    if name == "_to_copy":
        target = kwargs.get("device")
        if from_us:
            return int(target is not None and torch.device(target).type == "cpu")
        return int(not kwargs.get("non_blocking"))
    to, source = (isinstance(each, Pretended) for each in args[:2])
    return int(to != source and not (kwargs.get("non_blocking") or any(args[2:3])))


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _told(each: Any) -> Any:
    """A device as torch has to be told it."""
    if isinstance(each, torch.device) and each.type == "cuda":
        return _INNER
    return _INNER if isinstance(each, str) and each.split(":")[0] == "cuda" else each


def _listed(index: Any) -> Any:
    """An index with its lists as tensors on the device, as CUDA copies them."""
    if isinstance(index, tuple):
        return tuple(map(_listed, index))
    return torch.tensor(index).to(_INNER) if isinstance(index, list) else index


def _refuse_numpy(*_: Any) -> None:
    raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")


# What is asked of one of our tensors before anything is dispatched.
_ANSWERS: dict[Any, Callable[..., Any]] = {
    Tensor.device.__get__: lambda *_: CUDA,
    Tensor.is_cuda.__get__: lambda *_: True,  # type: ignore[attr-defined]
    Tensor.tolist: lambda tensor: tensor.to("cpu").tolist(),
    Tensor.numpy: _refuse_numpy,
    Tensor.__array__: _refuse_numpy,
    Tensor.new_tensor: (
        lambda tensor, data, **given: torch.tensor(
            data, **{"dtype": tensor.dtype} | given | {"device": "cpu"}
        ).to(_INNER)
    ),
}


class _Functions(TorchFunctionMode):
    """What torch asks a tensor, or of a device, before it dispatches."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Pretended):
            if func in _ANSWERS:
                return _ANSWERS[func](*args, **kwargs)
            if func in (Tensor.__getitem__, Tensor.__setitem__):
                args = (args[0], _listed(args[1]), *args[2:])
        if func is torch.tensor and _told(kwargs.get("device")) == _INNER:
            return torch.tensor(*args, **kwargs | {"device": "cpu"}).to(_INNER)
        if func is torch.device:
            return func(*args, **kwargs)
        return func(*map(_told, args), **{key: _told(value) for key, value in kwargs.items()})


def install() -> Counts:
    """From now on, in every thread that begins, torch sees one GPU of Hopper's kind."""
    backend_registration._setup_privateuseone_for_python_backend("pretended")
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "a pretended GPU",
        "mem_get_info": lambda *_: (79 * 2**30, 80 * 2**30),
        "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "synchronize": lambda *_: None,
        "device": lambda *_: nullcontext(),
        "stream": lambda *_: nullcontext(),
        "Stream": lambda *_: _Stream(),
        "current_stream": lambda *_: _Stream(),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    Tensor.cuda = lambda self, *_, **__: self.to(CUDA)  # type: ignore[method-assign]
    Tensor.cpu = lambda self, *_, **__: self.to("cpu")  # type: ignore[method-assign]
    Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]
    Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]
    run = threading.Thread.run

    def with_modes(thread: threading.Thread) -> None:
        with _Functions(), _Dispatch():
            run(thread)

    threading.Thread.run = with_modes  # type: ignore[method-assign, assignment]
    _Functions().__enter__()
    _Dispatch().__enter__()
    return COUNTS


class _Stream:
    """All is done at once, so there is nothing to wait for."""

    def wait_event(self, _: object) -> None: ...

    def record_event(self) -> Any:
        return SimpleNamespace(synchronize=lambda: COUNTS.add(COUNTS.waits, "event"))


def pytest_configure() -> None:
    """As a plugin of pytest."""
    install()


def main() -> None:
    """A program, or with -m a module, on the pretended device."""
    install()
    arguments = sys.argv[1:]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()

"""What a pickle would do, found out without doing any of it.

torch's own reader of plain data runs a closed list of functions, of which some take any amount of
memory (`bytearray`, tensors by their shape), and it hashes or prints whatever it is given. So the
instructions are followed here first, over values that stand for what they would make: only what
`torch.save` writes for tensors, plain values and objects of known classes gets past.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from assay.io.strict_json import shown

STORAGES = {
    "torch.BFloat16Storage": 2,
    "torch.BoolStorage": 1,
    "torch.ByteStorage": 1,
    "torch.CharStorage": 1,
    "torch.DoubleStorage": 8,
    "torch.FloatStorage": 4,
    "torch.HalfStorage": 2,
    "torch.IntStorage": 4,
    "torch.LongStorage": 8,
    "torch.ShortStorage": 2,
}
"""Bytes per number."""

DTYPES = (
    "torch.bfloat16",
    "torch.bool",
    "torch.float16",
    "torch.float32",
    "torch.float64",
    "torch.int32",
    "torch.int64",
    "torch.uint8",
)

CALLED = (
    "builtins.set",
    "collections.OrderedDict",
    "torch.Size",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
    "torch.device",
)


@dataclass(frozen=True)
class _Global:
    """A function or class by its name."""

    name: str


@dataclass(frozen=True, eq=False)
class _Made:
    """What a function or class would make; `kind` is its name."""

    kind: str


class _Other:
    """A plain value that nothing depends on."""


_OTHER = _Other()


def scan(
    pickle: bytes, records: Mapping[str, int], inert: Collection[str], held: Collection[str]
) -> None:
    """Follow a pickle of `torch.save`, protocol 2.

    Args:
        pickle: its instructions.
        records: bytes of each storage in the file, by its key.
        inert: full names of classes of which it may make objects.
        held: full names of functions that it may hold, and not call.

    Raises:
        ValueError: it would make or call anything else, use what it has not made, or read a storage
            that is not as it says.
    """
    machine = _Machine(records, frozenset(inert), frozenset(held))
    for instruction, argument, _ in pickletools.genops(pickle):
        if instruction.name not in _STEPS:
            raise ValueError(f"the instruction {instruction.name} is none of torch.save's")
        try:
            _STEPS[instruction.name](machine, argument)
        except (IndexError, KeyError, TypeError):
            raise ValueError(f"the instruction {instruction.name} has nothing to work on") from None
    if machine.marks or machine.stack:
        raise ValueError("it makes more than one value")


class _Machine:
    """A stack of values that stand for others. A method is an instruction."""

    def __init__(
        self, records: Mapping[str, int], inert: frozenset[str], held: frozenset[str]
    ) -> None:
        self.records, self.inert = records, inert
        self.named = inert | held | {*CALLED, *STORAGES, *DTYPES}
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def begin(self, protocol: int) -> None:
        if protocol != 2:
            raise ValueError(f"its protocol is {protocol}, wanted torch.save's 2")

    def stop(self, _: None) -> None:
        self.stack.pop()

    def push(self, value: object) -> None:
        self.stack.append(value)

    def push_other(self, _: object) -> None:
        self.stack.append(_OTHER)

    def push_list(self, _: None) -> None:
        self.stack.append([])

    def push_dict(self, _: None) -> None:
        self.stack.append({})

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        found = self.memo[index]
        # Lists of one list twice, again and again, are short here and endless to whoever reads on.
        if type(found) in (list, dict) or (
            type(found) is tuple and any(type(item) in (list, dict, tuple) for item in found)
        ):
            raise ValueError("it has one list in two places")
        self.stack.append(found)

    def mark(self, _: None) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def push_tuple(self, _: None) -> None:
        items = self.to_mark()
        self.stack.append((*items,))

    def push_last(self, count: int) -> None:
        items = [self.stack.pop() for _ in range(count)]
        self.stack.append((*reversed(items),))

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError
        self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        target, keys = self.stack[-1], items[::2]
        # Only of these is the hash known to take no time.
        if len(items) % 2 or not all(type(key) in (str, int) for key in keys):
            raise TypeError
        if type(target) is dict:
            target.update(zip(keys, items[1::2], strict=True))
        elif type(target) is not _Made or target.kind != "collections.OrderedDict":
            raise TypeError

    def push_global(self, name: str) -> None:
        module, _, name = name.partition(" ")
        # Protocol 2 has Python 2's name of a module.
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full not in self.named:
            raise ValueError(f"it needs {shown(full)}, which is no part of what is read here")
        self.stack.append(_Global(full))

    def load_storage(self, _: None) -> None:
        match self.stack.pop():
            case ("storage", _Global(kind), str(key), str(), int(numbers)) if kind in STORAGES:
                if numbers * STORAGES[kind] != self.records.get(key):
                    raise ValueError(
                        f"its storage {shown(key)} of {numbers} numbers is missing, or of another"
                        " size in the file"
                    )
            case _:
                raise ValueError("it has a storage that is none of torch.save's")
        self.stack.append(_Made("a storage"))

    def make(self, _: None) -> None:
        given, cls = self.stack.pop(), self.stack.pop()
        if type(given) is not tuple or type(cls) is not _Global or cls.name not in self.inert:
            raise ValueError("it makes an object of something that is no class of these libraries")
        self.stack.append(_Made(cls.name))

    def call(self, _: None) -> None:
        given, called = self.stack.pop(), self.stack.pop()
        if type(called) is not _Global or type(given) is not tuple:
            raise ValueError("it calls something that is no function")
        if called.name not in self.inert and not _is_usual(called.name, given):
            raise ValueError(f"it calls {called.name} otherwise than torch.save does")
        self.stack.append(_Made(called.name))

    def set_state(self, _: None) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        kind = made.kind if type(made) is _Made else ""
        if kind == "collections.OrderedDict":
            # A state dict's versions; other attributes could hide its methods.
            is_usual = type(state) is dict and state.keys() <= {"_metadata"}
        else:
            is_usual = kind in self.inert and type(state) is dict
        if not is_usual:
            raise ValueError("it sets attributes of something that is no object of these libraries")


def _is_usual(name: str, given: tuple[Any, ...]) -> bool:
    """Whether torch.save writes a call of a function of `CALLED` with what is ``given``."""
    match name, given:
        case ("builtins.set", ([*items],)):
            return all(type(item) is str for item in items)
        case ("torch.Size", ([*sizes],)):
            return all(type(size) is int for size in sizes)
        case (
            "torch._utils._rebuild_tensor_v2",
            (_Made("a storage"), int(), [*sizes], [*strides], _, _Made("collections.OrderedDict")),
        ):
            return all(type(size) is int for size in (*sizes, *strides))
        case (
            ("collections.OrderedDict", ())
            | ("torch.device", (str(),) | (str(), int()))
            | (
                "torch._utils._rebuild_parameter",
                (_Made("torch._utils._rebuild_tensor_v2"), _, _Made("collections.OrderedDict")),
            )
        ):
            return True
        case _:
            return False


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "APPEND": lambda machine, _: machine.extend([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.to_mark()),
    "BINFLOAT": _Machine.push_other,
    "BINGET": _Machine.get,
    "BININT": _Machine.push,
    "BININT1": _Machine.push,
    "BININT2": _Machine.push,
    "BINPERSID": _Machine.load_storage,
    "BINPUT": _Machine.put,
    "BINUNICODE": _Machine.push,
    "BUILD": _Machine.set_state,
    "EMPTY_DICT": _Machine.push_dict,
    "EMPTY_LIST": _Machine.push_list,
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "GLOBAL": _Machine.push_global,
    "LONG1": _Machine.push,
    "LONG_BINGET": _Machine.get,
    "LONG_BINPUT": _Machine.put,
    "MARK": _Machine.mark,
    "NEWFALSE": _Machine.push_other,
    "NEWOBJ": _Machine.make,
    "NEWTRUE": _Machine.push_other,
    "NONE": _Machine.push_other,
    "PROTO": _Machine.begin,
    "REDUCE": _Machine.call,
    "SETITEM": lambda machine, _: machine.update([machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine, _: machine.update(machine.to_mark()),
    "STOP": _Machine.stop,
    "TUPLE": _Machine.push_tuple,
    "TUPLE1": lambda machine, _: machine.push_last(1),
    "TUPLE2": lambda machine, _: machine.push_last(2),
    "TUPLE3": lambda machine, _: machine.push_last(3),
}

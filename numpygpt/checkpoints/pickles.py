"""Pickles as descriptions: torch.save's programs are followed, and nothing in them is called.

A pickle is a program for a small stack machine; ``pickle.load`` lets it call any function that it
names. The interpreter here knows only the instructions that torch.save writes and only the names
below. What a name would build becomes a description (:class:`StoredTensor`, :class:`Record`) made
by this module; any other name or instruction ends in an error. The standard library's tables of
instructions (``pickletools``) tell what stands behind each; they execute nothing.

References
----------
https://github.com/pytorch/pytorch, torch/serialization.py and torch/_utils.py.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import CheckpointError

__all__ = [
    "ITEM_BYTES",
    "Budget",
    "Global",
    "Record",
    "Storage",
    "StoredTensor",
    "Stream",
    "interpret",
]

# gpt2-xl with its optimiser takes 60,000 instructions in 1 MB. A quarter of a million become at
# most 40 MB of Python objects (measured: an empty dict each, remembered).
MOST_INSTRUCTIONS = 2**18
MOST_BYTES = 2**22
# Instructions that move many objects at once may move so many in all: ten times those there are.
MOST_MOVES = 10 * MOST_INSTRUCTIONS
# A checkpoint asks for about ten names; the longest of those below has 43 letters.
MOST_NAMES, LONGEST_NAME = 100, 80
# The functions below have up to 7 arguments.
MOST_ARGUMENTS = 10

# Storage classes: the name of their type, and bytes for each element.
STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "UntypedStorage": "U8",
}  # fmt: skip
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
    "BOOL": 1,
}  # fmt: skip

# Classes of plain data, in whatever module they stand: their fields are kept, their code is not.
# GPTConfig is nanoGPT's and its descendants', CfgNode minGPT's.
RECORDS = {"GPTConfig", "CfgNode", "Namespace", "SimpleNamespace"}

# What stands beside the weights in training checkpoints, of no interest here: kept as a name.
INERT = {
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype",
    "torch.device", "torch.Size", "_codecs.encode",
    "torch.float64", "torch.float32", "torch.float16", "torch.bfloat16", "torch.int64",
    "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath",
}  # fmt: skip


class Global(NamedTuple):
    """A name that a pickle imports. It is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Storage(NamedTuple):
    """A block of numbers: its type, its key in the file, how many.

    In legacy files it may be a part of the block, which begins at number ``first``.
    """

    kind: str
    key: str
    length: int
    first: int = 0


class StoredTensor(NamedTuple):
    """A tensor as strides over a storage, all in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Record(NamedTuple):
    """An object of plain data: the name of its class, and its fields."""

    name: str
    fields: dict[Any, Any]


class Budget:
    """What may still be spent on the pickles of one file, and the storages they have named.

    ``storages`` is by key, with the type of each.
    """

    def __init__(self) -> None:
        self.instructions = MOST_INSTRUCTIONS
        self.moves = MOST_MOVES
        self.storages: dict[str, str] = {}


class Stream:
    """A part of a buffer as the kind of file that the tables of ``pickletools`` read.

    Parameters
    ----------
    buffer : bytes-like
    start, stop : int
        At most :data:`MOST_BYTES` apart are readable.
    """

    def __init__(self, buffer: Any, start: int, stop: int):
        self._buffer, self._position = buffer, start
        self._stop = min(stop, start + MOST_BYTES)

    def tell(self) -> int:
        """The position in the buffer."""
        return self._position

    def read(self, size: int) -> bytes:
        """Up to `size` bytes."""
        end = min(self._position + max(size, 0), self._stop)
        piece = bytes(self._buffer[self._position : end])
        self._position = end
        return piece

    def readline(self) -> bytes:
        """Bytes up to the next newline; longer ones than any name are cut."""
        window = bytes(self._buffer[self._position : min(self._position + 512, self._stop)])
        return self.read(window.find(b"\n") + 1 or len(window))


def interpret(
    stream: Stream, source: object, budget: Budget | None = None
) -> tuple[Any, list[str]]:
    """The object that a pickle describes.

    Parameters
    ----------
    stream : Stream
        Left behind the pickle's last byte.
    source : object
        Names the file in messages.
    budget : Budget, optional
        To be shared by the pickles of one file.

    Returns
    -------
    value : object
        Made of None, bool, int, float, str, bytes, tuple, list, dict and the classes above.
    names : list of str
        The globals it asked for, none of which was imported.

    Raises
    ------
    CheckpointError
        If it asks for anything that does not describe tensors, or is damaged.

    Examples
    --------
    >>> import pickle
    >>> text = pickle.dumps({"iter_num": 5}, protocol=2)
    >>> interpret(Stream(text, 0, len(text)), "example")
    ({'iter_num': 5}, [])
    >>> text = pickle.dumps(print)
    >>> interpret(Stream(text, 0, len(text)), "example")
    Traceback (most recent call last):
        ...
    numpygpt.errors.CheckpointError: example: its pickle asks for builtins.print, ...
    """
    try:
        return _Machine(source, budget or Budget()).run(stream)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{source}: damaged pickle before byte {stream.tell()}: {str(error)[:120]!a}"
        ) from None


class _Machine:
    """The stack, the memo, and one method for each group of instructions."""

    def __init__(self, source: object, budget: Budget):
        self.source = source
        self.budget = budget
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.names: dict[str, None] = {}

    def run(self, stream: Stream) -> tuple[Any, list[str]]:
        while True:
            opcode = OPCODES.get(stream.read(1))
            if opcode is None:
                raise self.refusal(
                    f"has an unknown instruction, or no end, at byte {stream.tell()}"
                )
            if opcode.name == "STOP":
                return self.stack.pop(), list(self.names)
            action = ACTIONS.get(opcode.name)
            if action is None and opcode.name not in PUSHES:
                raise self.refusal(
                    f"has the instruction {opcode.name}, which torch.save never writes"
                )
            self.budget.instructions -= 1
            if self.budget.instructions < 0:
                raise self.refusal(f"has over {MOST_INSTRUCTIONS} instructions")
            argument = self.argument(opcode, stream)
            if action is None:
                self.push(argument)
            else:
                action(self, argument)

    def argument(self, opcode: pickletools.OpcodeInfo, stream: Stream) -> Any:
        """What stands behind an instruction: a number or text, or None."""
        if opcode.name == "GLOBAL":  # for which pickletools would follow escapes
            return stream.readline()[:-1].decode("ascii"), stream.readline()[:-1].decode("ascii")
        return None if opcode.arg is None else opcode.arg.reader(stream)  # type: ignore[arg-type]

    def refusal(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: its pickle {what}; nothing in it was executed")

    def push(self, value: Any) -> None:
        if type(value) is int and value.bit_length() > 128:
            raise self.refusal("holds an integer that no tensor needs")
        self.stack.append(value)

    def spend(self, moves: int) -> None:
        self.budget.moves -= moves
        if self.budget.moves < 0:
            raise self.refusal("moves the same objects again and again")

    def pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def pop_tuple(self, size: int) -> None:
        items = tuple(self.stack[-size:])
        if len(items) < size:
            raise IndexError("a tuple of more than there is")
        self.stack[-size:] = [items]

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise self.refusal("appends to what is no list")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise self.refusal("sets items of what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Tuples in tuples can take exponential time to hash, and large integers can all have
            # the same hash.
            if type(key) not in (str, int):
                raise self.refusal(f"has a key that is a {type(key).__name__}")
            if type(key) is int and not -(2**32) < key < 2**32:
                raise self.refusal("has a key that is a large integer")
            target[key] = value

    def find(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise self.refusal("names a global by something else than text")
        if len(module) + len(name) > LONGEST_NAME or len(self.names) >= MOST_NAMES:
            raise self.refusal(f"asks for {module[:40]!a} and more, which no checkpoint does")
        found = Global(module, name)
        if not str(found).isascii() or not str(found).isprintable():
            raise self.refusal(f"asks for {str(found)!a}, which is no name")
        if name not in RECORDS and str(found) not in INERT and str(found) not in BUILDERS:
            storage = module in ("torch", "torch.storage") and name in STORAGES
            if not storage and str(found) not in ("torch.Tensor", "torch.nn.parameter.Parameter"):
                raise self.refusal(f"asks for {found}, which is not needed to describe tensors")
        self.names[str(found)] = None
        self.stack.append(found)

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Global) or type(arguments) is not tuple:
            raise self.refusal("calls what is no function")
        if len(arguments) > MOST_ARGUMENTS:
            raise self.refusal(f"gives {len(arguments)} arguments to {function}")
        self.stack.append(self.build(function, arguments))

    def build(self, function: Global, arguments: tuple[Any, ...]) -> Any:
        """What a call would have made, as a description."""
        if function.name in RECORDS:
            if arguments:
                raise self.refusal(f"gives arguments to {function.name}")
            return Record(function.name, {})
        if str(function) in INERT:
            return Record(str(function), {})
        builder = BUILDERS.get(str(function))
        if builder is None:
            raise self.refusal(f"calls {function}")
        if str(function) == "torch._tensor._rebuild_from_type_v2":
            inner, _, inner_arguments, _ = arguments
            sound = isinstance(inner, Global) and type(inner_arguments) is tuple
            if not sound or len(inner_arguments) > MOST_ARGUMENTS:
                raise self.refusal("rebuilds something else than a tensor")
            if str(inner) == str(function):  # which could go on for ever
                raise self.refusal("rebuilds itself")
            return self.build(inner, inner_arguments)
        return builder(*arguments)

    def set_state(self) -> None:
        """BUILD: the state of an object; only records have one that matters."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Record) and type(state) is dict:
            self.spend(len(state))
            target.fields.update(state)
        elif type(target) is not dict and not isinstance(target, Record | StoredTensor):
            raise self.refusal("sets the state of what has none")

    def find_storage(self) -> None:
        match self.stack.pop():
            case ("storage", Global(name=name), str(key), str(), int(length), *more) if (
                name in STORAGES
                and len(more) <= 1
                and type(length) is int
                and len(key) <= LONGEST_NAME
            ):
                first = 0
                match more:
                    case [] | [None]:
                        pass
                    case [(str(), int(first), int(length))]:  # a part of the block
                        pass
                    case _:
                        raise self.refusal("describes a storage in an unknown way")
                if not (0 <= length < 2**48 and 0 <= first < 2**48):
                    raise self.refusal(f"has a storage of {length} elements")
                self.budget.storages[key] = STORAGES[name]
                self.stack.append(Storage(STORAGES[name], key, length, first))
            case ("module", *_):
                raise self.refusal("holds a whole module with its code; save its state_dict")
            case _:
                raise self.refusal("refers to something that is no storage")


def _tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
) -> StoredTensor:
    """``torch._utils._rebuild_tensor_v2``; gradients and hooks are of no interest."""
    sound = isinstance(storage, Storage) and type(shape) is type(strides) is tuple
    if not sound or len(shape) != len(strides) or len(shape) > 8:
        raise ValueError("a tensor that is none")
    numbers = (offset, *shape, *strides)
    if not all(type(number) is int and 0 <= number < 2**48 for number in numbers):
        raise ValueError("a tensor with an impossible shape, stride or offset")
    if metadata:  # that it is to be negated, or conjugated
        raise ValueError("a view with other values than its storage; save a clone of it")
    return StoredTensor(storage, offset, shape, strides)


def _parameter(data: Any, *_: Any) -> Any:
    """``torch._utils._rebuild_parameter``: the tensor inside."""
    return data


def _ordered_dict(items: Any = ()) -> dict[Any, Any]:
    """``collections.OrderedDict``, which torch writes empty and fills afterwards."""
    if items:
        raise ValueError("an OrderedDict with arguments")
    return {}


BUILDERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _parameter,
}

OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}

# Instructions whose argument is the value.
PUSHES = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "SHORT_BINSTRING", "BINSTRING",
}  # fmt: skip


def _remember(machine: _Machine, argument: Any) -> None:
    machine.memo[len(machine.memo) if argument is None else argument] = machine.stack[-1]


ACTIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.pop_tuple(1),
    "TUPLE2": lambda machine, _: machine.pop_tuple(2),
    "TUPLE3": lambda machine, _: machine.pop_tuple(3),
    "APPEND": lambda machine, _: machine.append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "BINPUT": _remember,
    "LONG_BINPUT": _remember,
    "MEMOIZE": _remember,
    "BINGET": lambda machine, index: machine.push(machine.memo[index]),
    "LONG_BINGET": lambda machine, index: machine.push(machine.memo[index]),
    "GLOBAL": lambda machine, names: machine.find(*names),
    "STACK_GLOBAL": lambda machine, _: machine.find(machine.stack.pop(-2), machine.stack.pop()),
    "REDUCE": lambda machine, _: machine.reduce(),
    "NEWOBJ": lambda machine, _: machine.reduce(),
    "BUILD": lambda machine, _: machine.set_state(),
    "BINPERSID": lambda machine, _: machine.find_storage(),
}

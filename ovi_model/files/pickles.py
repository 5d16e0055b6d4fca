"""The pickle inside a PyTorch file, read without running it.

A pickle is a program that builds objects. PyTorch's `weights_only` keeps it from calling strangers, but not from asking
for any amount of memory with the functions it may call. Here nothing is called at all: `Unpickler` knows the operations
and the few names that weights need, and turns them into dictionaries of descriptions (`View`), of which
`torch_files.py` makes tensors.
"""

import pickle
import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import comfy.model_management
import torch

from .safetensors_header import MOST_AXES

LARGEST_PICKLE = 16 << 20  # bytes; that of the largest of these models has 0.4 million
LONGEST_TEXT = 1 << 20
MOST_OPERATIONS = 500_000  # about 36 a tensor
MOST_ARGUMENTS = 10  # of a call; tensors need eight
CHECK_EVERY = 4096  # operations between two looks at whether the user pressed Cancel

STORAGES = {"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
            "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
            "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
            "BoolStorage": torch.bool}
DTYPES = {str(dtype).removeprefix("torch."): dtype
          for dtype in (*STORAGES.values(), torch.float8_e4m3fn, torch.float8_e5m2)}
# Statistics of a training run beside the weights. ComfyUI lets them pass; here they become `None`.
STATISTICS = {"_codecs encode", "numpy dtype", "numpy.core.multiarray scalar", "numpy._core.multiarray scalar"}


class Storage(NamedTuple):
    """Bytes of the file, by the key the pickle gives them; `numel` elements of `dtype`."""

    key: str
    dtype: torch.dtype
    numel: int


class View(NamedTuple):
    """A tensor as the pickle describes it: offset and strides in elements of `dtype`."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Function(NamedTuple):
    """A name that a pickle may call, and what is done in its place."""

    call: Callable[..., Any]


class _Source:
    """What `pickletools.genops` reads from, with a limit on each piece and on the whole."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.at = file, file.tell()
        self.end = self.at + LARGEST_PICKLE

    def read(self, size: int) -> bytes:
        if size > LONGEST_TEXT or self.at > self.end:
            raise ValueError("a text in it is too long")
        data = self.file.read(size)
        self.at += len(data)
        return data

    def readline(self) -> bytes:
        line = self.file.readline(1000)
        self.at += len(line)
        return line


class Unpickler:
    """Reads pickles of weights as dictionaries, lists, numbers, texts and `View`s; calls nothing, imports nothing.

    The operations are those of PyTorch's `_weights_only_unpickler`. Whatever would let a short pickle make large
    objects is left out: nothing is copied by a call, and only texts and numbers are keys (hashing nested tuples takes
    time without end).
    """

    def __init__(self, file: BinaryIO) -> None:
        self.source = _Source(file)
        self.operations = 0
        self.storages: dict[str, Storage] = {}  # of all pickles read
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # stacks below a mark
        self.memo: dict[int, Any] = {}

    def load(self) -> object:
        """The next pickle of the file."""
        self.stack, self.outer, self.memo = [], [], {}
        try:
            for operation, argument, _ in pickletools.genops(self.source):  # type: ignore[arg-type]
                self.operations += 1
                if self.operations % CHECK_EVERY == 0:
                    comfy.model_management.throw_exception_if_processing_interrupted()
                if self.operations > MOST_OPERATIONS:
                    raise ValueError(f"its pickle has more than {MOST_OPERATIONS} operations")
                if operation.name == "STOP":
                    return self.stack.pop()
                self._do(operation.name, argument)
        except (LookupError, TypeError) as error:
            raise ValueError("its pickle is damaged") from error
        raise ValueError("its pickle has no end")

    def _do(self, name: str, argument: Any) -> None:
        if name in _NUMBERS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name in _OPERATIONS:
            _OPERATIONS[name](self, argument)
        elif name != "PROTO":
            raise pickle.UnpicklingError(f"it uses {name}, which weights do not need")

    def _mark(self, _: Any) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def _tuple(self, _: Any) -> None:
        items = tuple(self._since_mark())
        self.stack.append(items)

    def _last(self, count: int) -> None:
        """A tuple of the last few objects."""
        if len(self.stack) < count:
            raise LookupError
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def _append(self, _: Any) -> None:
        item = self.stack.pop()
        self._extend([item])

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("its pickle is damaged")
        self.stack[-1].extend(items)

    def _set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise ValueError("its pickle is damaged")
        for key, value in zip(items[::2], items[1::2], strict=True):
            short = type(key) is not int or abs(key) < 1 << 63  # longer ones can be made to collide by the thousand
            if not short or (key is not None and type(key) not in (str, int, float, bool, bytes)):
                raise pickle.UnpicklingError("it has names that are no texts or numbers")
            target[key] = value

    def _global(self, argument: str) -> None:
        module, _, leaf = argument.partition(" ")
        if module in ("torch", "torch.storage") and leaf in STORAGES:
            self.stack.append(STORAGES[leaf])
        elif module == "torch" and leaf in DTYPES:
            self.stack.append(DTYPES[leaf])
        elif argument in _FUNCTIONS:
            self.stack.append(_FUNCTIONS[argument])
        else:
            raise pickle.UnpicklingError(f"it uses {argument.replace(' ', '.')[:100]}, which weights do not need")

    def _reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Function) or type(arguments) is not tuple or len(arguments) > MOST_ARGUMENTS:
            raise pickle.UnpicklingError("it calls what is no function")
        self.stack.append(function.call(*arguments))

    def _build(self, _: Any) -> None:
        """Attributes of an object, such as the versions PyTorch writes beside a state dict: nothing needs them."""
        self.stack.pop()
        if not (self.stack[-1] is None or isinstance(self.stack[-1], dict | View)):
            raise pickle.UnpicklingError("it gives attributes to what has none")

    def _storage(self, _: Any) -> None:
        match self.stack.pop():
            case ("storage" | b"storage", torch.dtype() | Function() as kind, str(key), _, int(count)):
                view = None
            case ("storage" | b"storage", torch.dtype() | Function() as kind, str(key), _, int(count), view):
                pass
            case _:
                raise ValueError("a storage is described in a way of its own")
        dtype = torch.uint8 if kind is UNTYPED else kind
        if view is not None or not isinstance(dtype, torch.dtype) or type(count) is not int or count < 0:
            raise ValueError("a storage is described in a way of its own")
        storage = Storage(key, dtype, count)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError("a storage is described in two ways")
        self.stack.append(storage)


def _new_dict(*arguments: object) -> dict:
    if arguments:
        raise pickle.UnpicklingError("it copies a dictionary")
    return {}


def _view(storage: Storage, offset: int, shape: tuple, stride: tuple, *more: Any) -> View:
    """`_rebuild_tensor` and its successors; the third has the dtype as its seventh argument."""
    known = type(storage) is Storage and type(shape) is tuple and type(stride) is tuple
    if not known or len(shape) != len(stride) or len(shape) > MOST_AXES:
        raise ValueError("a tensor is described in a way of its own")
    if any(type(n) is not int or not 0 <= n < 1 << 60 for n in (offset, *shape, *stride)):
        raise ValueError("a tensor is larger than the file")
    dtype = more[2] if len(more) > 2 and isinstance(more[2], torch.dtype) else storage.dtype
    return View(storage, dtype, offset, shape, stride)


def _parameter(view: View, *_: object) -> View:
    if not isinstance(view, View):
        raise ValueError("a parameter is no tensor")
    return view


def _size(*arguments: tuple) -> tuple:
    return arguments[0] if arguments and type(arguments[0]) is tuple else ()


UNTYPED = Function(lambda *_: None)
_FUNCTIONS = {
    "collections OrderedDict": Function(_new_dict),
    "torch Size": Function(_size),
    "torch device": Function(lambda *_: None),
    "torch.nn.parameter Parameter": Function(_parameter),
    "torch.storage UntypedStorage": UNTYPED,
    **{f"torch._utils _rebuild_{name}": Function(_view) for name in ("tensor", "tensor_v2", "tensor_v3")},
    **{f"torch._utils _rebuild_{name}": Function(_parameter) for name in ("parameter", "parameter_with_state")},
    **{name: Function(lambda *_: None) for name in STATISTICS},
}
_NUMBERS = {"BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1", "BINUNICODE", "SHORT_BINSTRING"}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_DICT": dict, "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple}
_OPERATIONS: dict[str, Callable[[Unpickler, Any], None]] = {
    "MARK": Unpickler._mark,
    "TUPLE": Unpickler._tuple,
    "TUPLE1": lambda reader, _: reader._last(1),
    "TUPLE2": lambda reader, _: reader._last(2),
    "TUPLE3": lambda reader, _: reader._last(3),
    "APPEND": Unpickler._append,
    "APPENDS": lambda reader, _: reader._extend(reader._since_mark()),
    "SETITEM": Unpickler._set_item,
    "SETITEMS": lambda reader, _: reader._update(reader._since_mark()),
    "GLOBAL": Unpickler._global,
    "REDUCE": Unpickler._reduce,
    "NEWOBJ": Unpickler._reduce,
    "BUILD": Unpickler._build,
    "BINPERSID": Unpickler._storage,
}

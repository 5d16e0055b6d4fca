"""One memory for each stream, for guidance functions that remember something between steps.

A guidance node's function keeps what it remembers in variables of the function around it, in a
dictionary or in an object (core's 'APG' keeps a running average). Called for picture and sound in
turn, it would mix the two. So before each call its variables get the values that the same stream
left in them, as if each stream had a node of its own.

What others change between the calls (an attention patch that hands something to the function) is
seen by both streams. A list is taken for a record and left alone, and so is whatever belongs to
another package than the function.
"""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

CELL = "contents"


class Variable:
    """A closure's variable as a mapping of one entry, none while it is not assigned."""

    def __init__(self, cell: types.CellType):
        self.cell = cell

    def read(self) -> dict:
        try:
            return {CELL: self.cell.cell_contents}
        except ValueError:  # empty
            return {}

    def write(self, values: dict) -> None:
        if CELL in values:
            self.cell.cell_contents = values[CELL]
        elif self.read():
            del self.cell.cell_contents


class Entries:
    """The entries of a dictionary, or the attributes of an object."""

    def __init__(self, entries: dict):
        self.entries = entries

    def read(self) -> dict:
        return dict(self.entries)

    def write(self, values: dict) -> None:
        for key in self.entries.keys() - values.keys():
            del self.entries[key]
        for key, value in values.items():
            if key not in self.entries or self.entries[key] is not value:
                self.entries[key] = value


def package(value: Any) -> str:
    """The top-level package a function or an object's class belongs to."""
    return str(getattr(value, "__module__", None)).split(".")[0]


def places(function: Callable) -> Iterator[tuple[int, Variable | Entries]]:
    """Everything that a function can remember in, with an id."""
    home = package(function.func if isinstance(function, functools.partial) else function)
    waiting: list[Any] = [function]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, types.FunctionType):
            if package(value) == home:
                for cell in value.__closure__ or ():
                    yield id(cell), Variable(cell)
                    waiting.extend(Variable(cell).read().values())
        elif isinstance(value, functools.partial):
            waiting += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, types.MethodType):
            waiting += [value.__func__, value.__self__]
        elif isinstance(value, dict):
            yield id(value), Entries(value)
            waiting.extend(value.values())
        elif isinstance(value, list | tuple):
            waiting.extend(value)
        elif remembers(value, home):
            yield id(value), Entries(vars(value))
            waiting.extend(vars(value).values())


def remembers(value: Any, home: str) -> bool:
    """Whether a value is an object of the package `home` that is cheap and safe to change."""
    fixed = torch.Tensor | torch.nn.Module | type | types.ModuleType
    if not hasattr(value, "__dict__") or isinstance(value, fixed):
        return False
    return package(type(value)) == home


def equal(a: Any, b: Any) -> bool:
    """Whether two remembered values are the same object, or the same plain value."""
    return a is b or (type(a) is type(b) and isinstance(a, bool | int | float | str) and a == b)


class Remembered:
    """What is in one place, for each stream."""

    def __init__(self, place: Variable | Entries, streams: int):
        self.place = place
        self.start = place.read()
        self.left = self.start  # as the last call left it
        self.own = [dict(self.start) for _ in range(streams)]

    def enter(self, stream: int) -> None:
        now = self.place.read()
        for key in now.keys() | self.left.keys():
            if key not in now:
                for own in self.own:
                    own.pop(key, None)
            elif key not in self.left or now[key] is not self.left[key]:  # changed by others
                for own in self.own:
                    own[key] = now[key]
        self.place.write(self.own[stream])

    def exit(self, stream: int) -> None:
        self.own[stream] = self.place.read()
        self.left = {key: value for own in [*self.own, self.own[stream]]
                     for key, value in own.items()}
        self.place.write(self.left)

    def end(self) -> None:
        """Leave what both streams agree on or one alone has; put the rest back as it was."""
        values = dict(self.left)
        for key, value in self.left.items():
            shared = all(key in own for own in self.own)
            if shared and not all(equal(own[key], value) for own in self.own):
                if key in self.start:
                    values[key] = self.start[key]
                else:
                    del values[key]
        self.place.write(values)


class StreamMemory:
    """The memories of all guidance functions of one sampling.

    Functions that share a variable share it here too.
    """

    def __init__(self, streams: int = 2):
        self.streams = streams
        self.known: dict[int, Remembered] = {}
        self.places: dict[int, list[Remembered]] = {}  # by function

    @contextmanager
    def of(self, function: Callable, stream: int) -> Iterator[None]:
        """While it lasts, the function's variables hold what this stream left in them."""
        if id(function) not in self.places:
            self.places[id(function)] = [self.known.setdefault(key, Remembered(place, self.streams))
                                         for key, place in places(function)]
        remembered = self.places[id(function)]
        for each in remembered:
            each.enter(stream)
        try:
            yield
        finally:
            for each in remembered:
                each.exit(stream)

    def end(self) -> None:
        """Put back what was there where the streams differ: the next sampling starts afresh."""
        for each in self.known.values():
            each.end()
        self.known.clear()
        self.places.clear()

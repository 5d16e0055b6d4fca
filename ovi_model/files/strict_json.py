"""JSON of files that anybody may have written, as strict readers take it. Standard library only."""

import json
import re
from collections.abc import Callable


def parse_json(content: bytes, most_parts: int, number: Callable[[str], object] = float) -> object:
    """JSON of at most so many values; Python alone would take UTF-16, NaN and names twice.

    number: reads whole and broken numbers. Raises ValueError, or RecursionError if it is nested too deeply.
    """
    if sum(map(content.count, (b",", b"[", b"{"))) > most_parts:
        raise ValueError("it has too many parts")
    return json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=whole_number,
                      parse_float=number, parse_int=number)


def whole_number(text: str) -> int:
    """A number without a point; ValueError for any other."""
    if not re.fullmatch("-?[0-9]{1,19}", text):
        raise ValueError(f"{text[:20]} is no whole number of a file")
    return int(text)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("it has one name twice")
    return table

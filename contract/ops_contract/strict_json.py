"""What may be in a body: JSON that every reader takes for the same, and that a database can keep."""

import json
from collections import Counter
from typing import Any, NoReturn

# What pydantic, jsonschema and Python's own json each walk without running out of stack.
MAX_DEPTH = 64
INTEGERS = range(-(2**63), 2**63)


class NotStrict(ValueError):
    """The message says what is wrong."""


def check(body: bytes) -> None:
    """Raises NotStrict."""
    try:
        _check_values(_DECODER.decode(body.decode()))
    except NotStrict:
        raise
    except json.JSONDecodeError as error:
        raise NotStrict(f"not JSON: {error.msg} at character {error.pos}") from None
    except UnicodeDecodeError as error:
        raise NotStrict(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise NotStrict(_TOO_DEEP) from None
    except ValueError:  # more digits than Python reads
        raise NotStrict(_TOO_LARGE) from None


def _one_value_a_name(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers differ in which of two they take: what was checked would not be what is used."""
    found = dict(pairs)
    if len(found) != len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise NotStrict(f"{name[:100]!a} is there twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise NotStrict(f'{name} is no JSON; where a number may be it, write it as a string: "{name}"')


_TOO_DEEP = f"more than {MAX_DEPTH} levels deep"
_TOO_LARGE = "a number is too large: integers have 64 bits, others are float64"
_DECODER = json.JSONDecoder(object_pairs_hook=_one_value_a_name, parse_constant=_no_constant)


def _check_values(value: Any) -> None:
    """Level by level, and by the types that are there: a batch of reports is wide, not deep."""
    level, depth = [value], 0
    while level:
        if (depth := depth + 1) > MAX_DEPTH:
            raise NotStrict(_TOO_DEEP)
        below: list[Any] = []
        for each in level:
            kind = type(each)
            if kind is str:
                if "\0" in each or not (each.isascii() or _is_text(each)):
                    raise NotStrict(f"{each[:100]!a} is no text: it has a NUL, or half of a surrogate pair")
            elif kind is int:
                if each not in INTEGERS:
                    raise NotStrict(_TOO_LARGE)
            elif kind is float:
                if each - each != 0:  # an infinity
                    raise NotStrict(_TOO_LARGE)
            elif kind is dict:
                below += each
                below += each.values()
            elif kind is list:
                below += each
        level = below


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

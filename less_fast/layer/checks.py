"""What LESS refuses, and the one check of integers."""

from numbers import Integral


class LessError(ValueError):
    """Input that LESS refuses. The message says what was wrong and what to do."""


def integer(what: str, value: object, least: int = 1, most: int = 2**31 - 2) -> int:
    """The value as an int. LessError if it is no integer from `least` to `most` (positions are int32)."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        raise LessError(f"{what} must be an integer from {least} to {most:,}, not {value!r}")
    return int(value)

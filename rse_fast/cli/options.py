"""What the options of several commands read: numbers, fractions, counts. An error says what was expected and what was got."""

import argparse
from collections.abc import Callable


def number(text: str) -> float:
    """A number, or a fraction such as 8/255."""
    numerator, slash, denominator = text.partition("/")
    try:
        return float(numerator) / float(denominator) if slash else float(numerator)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"expected a number or a fraction, got {text!r}") from None


def at_least(low: int) -> Callable[[str], int]:
    """Reads an int of ``low`` or more."""

    def count(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {low}, got {text!r}")
        return value

    return count

"""Warnings of what an ensemble meets while it runs: they point at the line of the user's that called it."""

import sys
import warnings


def warn_caller(message: str) -> None:
    """Warns at the line of the user's that led here, however many of ours and of torch's stand between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("rse_fast", "torch", "contextlib"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RuntimeWarning, stacklevel=level)

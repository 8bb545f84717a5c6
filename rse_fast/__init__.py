"""rse-fast: Random Self-Ensemble (Liu et al., ECCV 2018) for PyTorch at the cost of the plain network."""

from rse_fast import functional, nn
from rse_fast.convert import convert, describe, noise_off, revert, set_sigma
from rse_fast.ensemble import Ensemble, Prediction
from rse_fast.export import export
from rse_fast.smoothing import Certificate, certify

__all__ = [
    "Certificate", "Ensemble", "Prediction", "certify", "convert", "describe", "export", "functional", "nn", "noise_off", "revert",
    "set_sigma",
]  # fmt: skip

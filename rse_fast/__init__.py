"""rse-fast: Random Self-Ensemble (Liu et al., ECCV 2018) for PyTorch at the cost of the plain network."""

from rse_fast import functional, nn
from rse_fast.certify import Certificate, certify  # the name is the function's from here on, the module's in sys.modules
from rse_fast.convert import convert, describe, noise_off, revert, set_sigma
from rse_fast.ensemble import Ensemble, Prediction

__all__ = [
    "Certificate", "Ensemble", "Prediction", "certify", "convert", "describe", "functional", "nn", "noise_off", "revert", "set_sigma",
]  # fmt: skip

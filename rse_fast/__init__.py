"""rse-fast: Random Self-Ensemble (Liu et al., ECCV 2018) for PyTorch at the cost of the plain network."""

from rse_fast import functional, nn
from rse_fast.convert import convert, describe, noise_off, revert
from rse_fast.ensemble import Ensemble, Prediction

__all__ = ["Ensemble", "Prediction", "convert", "describe", "functional", "nn", "noise_off", "revert"]

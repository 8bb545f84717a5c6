"""rse-fast: Random Self-Ensemble (Liu et al., ECCV 2018) for PyTorch: noise layers, packed ensembles, attacks, certificates."""

from rse_fast import functional, nn
from rse_fast.convert import convert, describe, noise_off, revert, set_sigma
from rse_fast.ensemble import Ensemble, Prediction, fit_temperature
from rse_fast.export import export
from rse_fast.input_noise import with_input_noise
from rse_fast.smoothing import Certificate, certify

__all__ = [
    "Certificate", "Ensemble", "Prediction", "certify", "convert", "describe", "export", "fit_temperature", "functional", "nn", "noise_off",
    "revert", "set_sigma", "with_input_noise",
]  # fmt: skip

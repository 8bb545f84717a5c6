"""rse-fast: Random Self-Ensemble for PyTorch at the cost of the plain network."""

from rse_fast import functional, nn

__all__ = ["functional", "nn"]

"""Random Self-Ensembles for inference: see `Ensemble`."""

from rse_fast.ensemble.engine import Ensemble, Prediction

__all__ = ["Ensemble", "Prediction"]

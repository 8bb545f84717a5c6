"""Random Self-Ensembles for inference: see `Ensemble`."""

from rse_fast.ensemble.engine import Ensemble
from rse_fast.ensemble.plan import shard
from rse_fast.ensemble.prediction import Prediction
from rse_fast.ensemble.temperature import fit_temperature

__all__ = ["Ensemble", "Prediction", "fit_temperature", "shard"]

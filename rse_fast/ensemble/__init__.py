"""Random Self-Ensembles for inference: see `Ensemble`."""

from rse_fast.ensemble.engine import Ensemble, Prediction
from rse_fast.ensemble.plan import shard

__all__ = ["Ensemble", "Prediction", "shard"]

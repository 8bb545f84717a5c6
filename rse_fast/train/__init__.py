"""Training of plain and defended networks, with checkpoints, on one or many devices: ``rse-fast train`` and what it is made of."""

from rse_fast.train.checkpoint import CheckpointError
from rse_fast.train.config import Config
from rse_fast.train.distributed import ProcessLost, Ranks
from rse_fast.train.run import is_validation_part, load_data, load_model, load_temperature, train
from rse_fast.train.trainer import Trainer

__all__ = [
    "CheckpointError", "Config", "ProcessLost", "Ranks", "Trainer", "is_validation_part", "load_data", "load_model", "load_temperature",
    "train",
]  # fmt: skip

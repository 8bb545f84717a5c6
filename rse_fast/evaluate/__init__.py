"""What attacks leave of a classifier's accuracy: `rse-fast evaluate`, and what it is made of.

Attacks come from foolbox and pyautoattack and act on the deployed ensemble: they see the log of the mean softmax over packed draws, with
fresh noise at every query (expectation over transformation). What they find is scored afterwards, with other noise, several times. The
protocols, and the checks that tell whether an attack worked at all, follow Athalye, Carlini & Wagner (ICML 2018), Carlini et al. (2019)
and Tramer et al. (NeurIPS 2020). foolbox and pyautoattack are imported when an attack runs.
"""

from rse_fast.evaluate.protocols import PROTOCOLS, Case
from rse_fast.evaluate.run import evaluate

__all__ = ["PROTOCOLS", "Case", "evaluate"]

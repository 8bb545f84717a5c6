"""Hugging Face: sigma is an argument of the constructor, so the configuration that is saved beside the weights brings the noise back.

pip install huggingface_hub transformers
python examples/hub.py
"""

import tempfile

import torch
from huggingface_hub import PyTorchModelHubMixin
from transformers import ResNetConfig, ResNetForImageClassification

import rse_fast
from rse_fast import models


class NoisyNet(torch.nn.Module, PyTorchModelHubMixin):
    """save_pretrained, from_pretrained and push_to_hub by the mixin, which keeps the arguments."""

    def __init__(self, init_sigma: float = 0.2, inner_sigma: float = 0.1):
        super().__init__()
        self.network = models.SmallNet(num_classes=10, in_channels=1, width=16)
        rse_fast.convert(self, init_sigma, inner_sigma)

    def forward(self, x):
        return self.network(x)


with tempfile.TemporaryDirectory() as folder:
    NoisyNet(init_sigma=0.3, inner_sigma=0.05).save_pretrained(folder)
    print(rse_fast.describe(NoisyNet.from_pretrained(folder)))

# A model of transformers: its configuration keeps what else it is given. The weights are those of the plain model, with the same names.
config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=10, layer_type="basic")
config.rse = {"init_sigma": 0.3, "inner_sigma": 0.05}
model = rse_fast.convert(ResNetForImageClassification(config), **config.rse)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    loaded = ResNetForImageClassification.from_pretrained(folder)
    print(rse_fast.describe(rse_fast.convert(loaded, **loaded.config.rse)))

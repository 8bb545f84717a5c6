"""The Trainer of transformers: a model that returns its loss and its logits; the noise is inside.

pip install 'transformers[torch]'
python examples/hf_trainer.py
"""

import tempfile

import torch
from digits import dataset, network, report
from transformers import Trainer, TrainingArguments, set_seed


class WithLoss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, pixel_values, labels=None):
        logits = self.network(pixel_values)
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def rows(part):
    return [{"pixel_values": image, "labels": int(label)} for image, label in dataset(part)]


set_seed(0)
model = WithLoss()
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, num_train_epochs=4, per_device_train_batch_size=64, learning_rate=3e-3, lr_scheduler_type="cosine", warmup_steps=10,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, dataloader_drop_last=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows("train"), eval_dataset=rows("val"))
    trainer.train()
report(model.network)

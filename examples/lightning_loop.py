"""Lightning: convert before the optimiser exists, and validate the ensemble with one seed, so that epochs can be compared.

pip install lightning
python examples/lightning_loop.py
"""

import lightning
import torch
from digits import dataset, network, report

import rse_fast


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = network()

    def training_step(self, batch, _):
        images, labels = batch
        return torch.nn.functional.cross_entropy(self.network(images), labels)

    def validation_step(self, batch, _):
        images, labels = batch
        found = rse_fast.Ensemble(self.network, draws=10, seed=0).predict(images)
        self.log("accuracy", (found.labels == labels).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


lightning.seed_everything(0)
classifier = Classifier()
options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
trainer = lightning.Trainer(max_epochs=4, **options)
trainer.fit(
    classifier,
    torch.utils.data.DataLoader(dataset("train"), batch_size=64, shuffle=True, drop_last=True),
    torch.utils.data.DataLoader(dataset("val"), batch_size=256),
)
report(classifier.network)

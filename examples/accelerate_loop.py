"""Accelerate: what it wraps is the converted model; each process draws other noise.

pip install accelerate
accelerate launch examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from digits import dataset, network, report

set_seed(0)
accelerator = Accelerator(cpu=True)
model = network().train()
loader = torch.utils.data.DataLoader(dataset("train"), batch_size=64, shuffle=True, drop_last=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs=4, steps_per_epoch=len(loader))
model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
for _ in range(4):
    for images, labels in loader:
        optimizer.zero_grad()
        accelerator.backward(torch.nn.functional.cross_entropy(model(images), labels))
        optimizer.step()
        schedule.step()
if accelerator.is_main_process:
    report(accelerator.unwrap_model(model))

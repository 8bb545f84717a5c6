"""torch.compile: the compiled step has fresh noise at every call, and backward computes it again instead of storing it.

python examples/compiled.py
"""

import torch
from digits import dataset, network, report

torch.manual_seed(0)
model = network().train()
compiled = torch.compile(model)  # not the Ensemble, which runs an optimised snapshot already
loader = torch.utils.data.DataLoader(dataset("train"), batch_size=64, shuffle=True, drop_last=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs=4, steps_per_epoch=len(loader))
for _ in range(4):
    for images, labels in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(compiled(images), labels).backward()
        optimizer.step()
        schedule.step()
report(model)

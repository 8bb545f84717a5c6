"""timm's step: a network of timm, mixup, its optimisers and schedules, and the moving average of the weights, which is evaluated.

pip install timm      # beside torch's CPU build first: pip install torchvision --index-url https://download.pytorch.org/whl/cpu
python examples/timm_loop.py
"""

import timm
import torch
from digits import dataset, report
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

import rse_fast

torch.manual_seed(0)
network = timm.create_model("resnet10t", num_classes=10, in_chans=1)
network.maxpool = torch.nn.Identity()  # for images of 8x8
model = rse_fast.convert(network, init_sigma=0.1, inner_sigma=0.05)
average = ModelEmaV3(model, decay=0.9)  # a copy: its layers are noisy as well, with noise of their own
loader = torch.utils.data.DataLoader(dataset("train"), batch_size=64, shuffle=True, drop_last=True)
mixup, loss_of = Mixup(mixup_alpha=0.1, num_classes=10, label_smoothing=0.0), SoftTargetCrossEntropy()
optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.01)
schedule = CosineLRScheduler(optimizer, t_initial=6 * len(loader), warmup_t=10, warmup_lr_init=1e-4, t_in_epochs=False)
step = 0
for _ in range(6):
    for images, labels in loader:
        images, targets = mixup(images, labels)
        optimizer.zero_grad()
        loss_of(model(images), targets).backward()
        optimizer.step()
        step += 1
        schedule.step_update(step)
        average.update(model, step=step)
report(average.module)

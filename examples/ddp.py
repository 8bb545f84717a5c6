"""DistributedDataParallel: each process draws other noise, also where all have the same generator seed.

torchrun --nproc-per-node 2 examples/ddp.py
"""

import torch
from digits import dataset, network, report
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

distributed.init_process_group("gloo")  # "nccl" on GPUs
torch.manual_seed(0)
model = network().train()
wrapped = DistributedDataParallel(model)
sampler = torch.utils.data.distributed.DistributedSampler(dataset("train"), drop_last=True)
loader = torch.utils.data.DataLoader(dataset("train"), batch_size=32, sampler=sampler, drop_last=True)
optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs=4, steps_per_epoch=len(loader))
for epoch in range(4):
    sampler.set_epoch(epoch)
    for images, labels in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(wrapped(images), labels).backward()
        optimizer.step()
        schedule.step()
if distributed.get_rank() == 0:
    report(model)
distributed.barrier()  # none leaves while another needs it
distributed.destroy_process_group()

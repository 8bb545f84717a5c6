"""FSDP2: weights, gradients and the optimiser's state are shared out among the processes; sigma, a number, is in each.

torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import torch
from digits import dataset, network, report
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

distributed.init_process_group("gloo")  # "nccl" on GPUs, and "cuda" in the next line
mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
torch.manual_seed(0)
model = network().train()
for layer in model.features:  # each layer that has weights is gathered by itself
    if next(layer.parameters(), None) is not None:
        fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
sampler = torch.utils.data.distributed.DistributedSampler(dataset("train"), drop_last=True)
loader = torch.utils.data.DataLoader(dataset("train"), batch_size=32, sampler=sampler, drop_last=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs=4, steps_per_epoch=len(loader))
for epoch in range(4):
    sampler.set_epoch(epoch)
    for images, labels in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()
whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if distributed.get_rank() == 0:  # the weights of the whole are those of a model that is not shared out
    alone = network()
    alone.load_state_dict(whole)
    report(alone)
distributed.barrier()  # none leaves while another needs it
distributed.destroy_process_group()

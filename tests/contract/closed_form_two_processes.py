"""One of two processes that train the closed form together; started by test_closed_form.py.

Arguments: ``ddp`` or ``fsdp``, and the file to write. Each process takes half of
every batch; The file gets the trained and the kept factors in full.
"""

from __future__ import annotations

import faulthandler
import os
import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.contract.models import CASES, inject, inputs, loss_of
from tests.contract.test_closed_form import delta

#: seconds until a process that waits for the other says where, and ends.
HANGS_S = 100


def main(engine: str, out: str) -> None:
    faulthandler.dump_traceback_later(HANGS_S, exit=True)
    # They meet at a file: a port that is free now may be taken by another test a moment later.
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meeting = f"file://{out}.meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    case = CASES["llama"]
    method = delta("closed_form", start_step=1)
    model = inject(method, case.model(dtype=torch.float64), case)
    if engine == "ddp":
        network: nn.Module = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        network = fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(
        [p for group in method.param_groups(model) for _, p in group["params"]],
        lr=method.learning_rate,
        weight_decay=0.1,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min((t + 1) / 10, 1 - t / 7))
    for step in range(6):
        part = {name: x[rank::2].contiguous() for name, x in inputs(model, step).items()}
        loss_of(model, network(**part).logits, part["labels"]).backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        nn.utils.clip_grad_norm_(trained, 0.5)
        method.before_step(step)
        optimizer.step()
        method.after_step(step)
        schedule.step()
        optimizer.zero_grad()
    method.finish(6)
    tensors = {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()
        for name, p in model.named_parameters()
        if "kept" in name or p.requires_grad
    }
    if rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

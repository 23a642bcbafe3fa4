"""Check 12: two processes whose second one has no batch of the validation set."""

from __future__ import annotations

import datetime
import faulthandler
from pathlib import Path
from typing import Any

import torch

from delta_lora.trainer import Trainer
from scripts.checking import children, models, synthetic
from scripts.checking.finding import Context, Finding

#: seconds of a fit after which it counts as hanging, and of the two processes in all.
FIT_TIMEOUT_S, TIMEOUT_S = 30, 120.0
STEPS = 8
#: both have buffers in the model; DyLoRA brings its own.
METHODS = ("lora", "dylora")


def two_processes(context: Context) -> Finding:
    """Train RoBERTa on two processes over gloo; validation is a single batch.

    NCCL refuses two processes on one device, and what is checked, who waits for whom, is the
    trainer's.
    """
    finding = Finding()
    folder, port = context.folder / "processes", str(children.free_port())
    started = [
        children.start(
            "train_on_rank", {"device": context.device, "folder": str(folder)}, folder,
            name=f"rank{rank}",
            environment={
                "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                # On CUDA both are process 0 of a device each, and it is the same one.
                "LOCAL_RANK": "0" if context.is_cuda else str(rank),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo",
            },
        )
        for rank in range(2)
    ]  # fmt: skip
    with children.ended_after(started):
        children.wait(started, TIMEOUT_S, "training on two processes")
    first, second = (child.result() for child in started)
    finding.values = {"rank0": first, "rank1": second}
    for method in METHODS:
        finding.equal(f"{method}_evaluations", len(first[method]["validation"]), 2)
        finding.equal(f"{method}_ranks_agree", first[method] == second[method], True)
    return finding


def train_on_rank(*, device: str, folder: str) -> dict[str, Any]:
    """Train on this process's share; ends the process with its stack where a fit hangs."""
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=FIT_TIMEOUT_S))
    answer = {method: _train(method, device, Path(folder) / f"run-{method}") for method in METHODS}
    torch.distributed.destroy_process_group()
    return answer


def _train(method_name: str, device: str, folder: Path) -> dict[str, Any]:
    model = models.build("roberta_base", device, layers=2, small=True, dropout=0.0)
    method = models.make_method(method_name, "roberta_base")
    method.inject(model, projections=None, head=("classifier",), total_steps=STEPS, seed=1)
    trainer = Trainer(
        batch_size=4, max_steps=STEPS, eval_batch_size=8, log_every_steps=4, device=device
    )
    faulthandler.dump_traceback_later(FIT_TIMEOUT_S, exit=True)
    # Groups of one example: 16 are four steps an epoch, 5 for validation are one batch.
    result = trainer.fit(
        model, method=method, task=synthetic.task("roberta_base"),
        train=synthetic.groups(synthetic.labelled(16, 20, 160, seed=11), 1),
        validation=synthetic.groups(synthetic.labelled(5, 20, 160, seed=12), 1),
        seed=1, folder=folder,
    )  # fmt: skip
    faulthandler.cancel_dump_traceback_later()
    return {
        "steps": result.num_steps,
        "loss": result.final_train_loss,
        "validation": result.validation,
    }

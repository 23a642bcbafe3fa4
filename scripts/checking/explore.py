"""Figures without a verdict: what could make a step of GPT2-Medium cheaper than it is.

A step is bound by launches, so these ask what one costs with the launches taken away or shared:
many adapters over one frozen base in one step, one CUDA graph, several processes under MPS, and, as
a check of its own, compiled.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delta_lora.projections import find_projections
from delta_lora.trainer import Trainer
from scripts.checking import children, lengths, models, speed, steps
from scripts.checking.finding import Context, Deadline, Finding

SLOTS = (1, 4, 16, 64)
RANK, SCALING, RATE = 4, 8.0, 2e-4
TOKENS, TARGETS = 480, 200
COMPILE_TIMEOUT_S = 170.0
MPS = "nvidia-cuda-mps-control"


class SlotLinear(nn.Module):
    """A frozen layer with M low-rank branches, one for each row of the batch.

    Args:
        base_layer: GPT-2's fused layer, whose input is (M, T, I) and output (M, T, 3 I).
        starts: first output of every adapted slice, each of the input's width.
        num_slots: M.
    """

    def __init__(self, base_layer: nn.Module, starts: list[int], num_slots: int) -> None:
        super().__init__()
        self.base_layer, self.starts = base_layer, starts
        weight = base_layer.weight
        assert isinstance(weight, Tensor)
        self.width = width = weight.shape[0]
        bound = width**-0.5  # Kaiming uniform with a = sqrt 5, as in the suite's branches
        self.A = nn.Parameter(weight.new_empty(num_slots, width, RANK * len(starts)))
        nn.init.uniform_(self.A, -bound, bound)
        self.B = nn.ParameterList(weight.new_zeros(num_slots, RANK, width) for _ in starts)

    def forward(self, x_MTI: Tensor) -> Tensor:
        """Return the base product plus each row's own branches."""
        out_MTO = self.base_layer(x_MTI)
        h_MTR = torch.bmm(x_MTI, self.A) * SCALING
        for start, h_part, B in zip(self.starts, h_MTR.split(RANK, dim=-1), self.B, strict=True):
            out_MTO.narrow(-1, start, self.width).add_(torch.bmm(h_part, B))
        return out_MTO


def explore(context: Context) -> Finding:
    """Try each idea; one that fails says why and does not stop the others."""
    finding = Finding()
    ideas: dict[str, Callable[[Context], dict[str, Any]]] = {
        "slots_over_one_base": slots, "cuda_graph": cuda_graph, "processes_under_mps": under_mps,
    }  # fmt: skip
    for name, idea in ideas.items():
        began = time.monotonic()
        try:
            finding.values[name] = idea(context)
        except Exception as error:
            finding.values[name] = {"failed": " ".join(f"{type(error).__name__}: {error}".split())}
        context.say(f"{name}: {finding.values[name]} ({time.monotonic() - began:.0f} s)")
        steps.clean_up(context.device)
    return finding


def slots(context: Context) -> dict[str, Any]:
    """Time a step of M LoRA runs over one frozen base, in TF32: one batch row and branch each."""
    Trainer(batch_size=1, device=context.device, matmul_precision="tf32").prepare_backend()
    found: dict[str, Any] = {}
    for number in SLOTS[:2] if context.is_small else SLOTS:
        model = _base(context)
        _put_slots(model, number)
        try:
            ms, peak = _time_steps(context, _slot_step(context, model, number))
        except torch.OutOfMemoryError:
            found[str(number)] = "out of memory"
        else:
            found[str(number)] = {
                "ms_per_step": round(ms, 2), "ms_per_run": round(ms / number, 2),
                "peak_bytes": peak,
            }  # fmt: skip
        del model
        steps.clean_up(context.device)
        torch.set_float32_matmul_precision("high")
    return {
        "tokens_per_row": _size(context)[0], "matmul_precision": "tf32", "by_number": found,
        "loss_difference_of_the_mask": mask_difference(context),
    }  # fmt: skip


def _put_slots(model: Any, number: int) -> None:
    model.requires_grad_(False)
    starts: dict[str, list[int]] = {}
    for projection in find_projections(model, None):
        starts.setdefault(projection.layer, []).append(projection.start)
    for layer, positions in starts.items():
        parent, _, leaf = layer.rpartition(".")
        slot = SlotLinear(model.get_submodule(layer), positions, number)
        setattr(model.get_submodule(parent), leaf, slot)


def _slot_step(context: Context, model: Any, number: int) -> Callable[[], Any]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=True)
    inputs = _fixed_batch(context, model, rows=number)

    def step() -> None:
        _loss(model, *inputs).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def cuda_graph(context: Context) -> dict[str, Any]:
    """Time LoRA's step at a fixed length as it is and as one CUDA graph, in float32 and TF32."""
    if not context.is_cuda:
        return {"skipped": "needs a CUDA device"}
    found: dict[str, Any] = {"tokens": TOKENS}
    for matmul in ("fp32", "tf32"):
        Trainer(batch_size=1, device=context.device, matmul_precision=matmul).prepare_backend()
        step = _graph_step(context)
        plain_ms, _ = _time_steps(context, step)
        graph = _capture(step)
        graph_ms, _ = _time_steps(context, graph.replay)
        found[matmul] = {"ms_per_step": round(plain_ms, 2), "ms_as_graph": round(graph_ms, 2)}
        del step, graph
        steps.clean_up(context.device)
    return found


def _graph_step(context: Context) -> Callable[[], Any]:
    """Return a step of LoRA that allocates and decides nothing that a graph cannot repeat."""
    model = _base(context)
    method = models.make_method("lora", "gpt2_medium")
    method.inject(model, projections=None, head=(), total_steps=100, seed=1)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    rate = torch.tensor(RATE, device=context.device)
    optimizer = torch.optim.AdamW(trained, lr=rate, fused=True, capturable=True)
    inputs = _fixed_batch(context, model, rows=1)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        _loss(model, *inputs).backward()
        optimizer.step()

    return step


def _capture(step: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """Record `step` as a graph, warmed up on a stream of its own as capturing needs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def under_mps(context: Context) -> dict[str, Any]:
    """Count the steps a second of four processes whose kernels run at the same time (CUDA MPS)."""
    if not context.is_cuda:
        return {"skipped": "needs a CUDA device"}
    if shutil.which(MPS) is None:
        return {"skipped": f"{MPS} is not installed"}
    with _mps_daemon(context) as environment:
        settings = {"matmul_precision": "tf32"}
        return speed.together(context, speed.PROCESSES, settings, environment)


@contextlib.contextmanager
def _mps_daemon(context: Context) -> Iterator[dict[str, str]]:
    """Run an MPS daemon of our own: its pipes are in our folder, so nobody else meets it."""
    command = shutil.which(MPS)
    assert command is not None
    folder = context.folder / "mps"
    folder.mkdir(parents=True)
    pipes = {"CUDA_MPS_PIPE_DIRECTORY": str(folder), "CUDA_MPS_LOG_DIRECTORY": str(folder)}
    environment = {**os.environ, **pipes}
    # In the foreground, so that it ends with this process's group whatever happens.
    daemon = subprocess.Popen(  # noqa: S603 - found by name
        [command, "-f"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = Deadline(15, MPS)
        while not (folder / "control").exists():
            deadline.check()
            if daemon.poll() is not None:
                raise RuntimeError(f"{MPS} ended with {daemon.returncode}")
            time.sleep(0.1)
        yield pipes
    finally:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(  # noqa: S603 - found by name
                [command], input="quit\n", env=environment, timeout=20, text=True,
                capture_output=True, check=False,
            )  # fmt: skip
        daemon.terminate()
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def compiled_in_child(context: Context) -> Finding:
    """Time the compiled step in a process of its own, which a slow compilation may not outlive."""
    arguments = {
        "device": context.device, "is_small": context.is_small,
        "folder": str(context.folder / "compiled"),
    }  # fmt: skip
    child = children.start("compiled", arguments, context.folder / "children")
    with children.ended_after([child]):
        children.wait([child], COMPILE_TIMEOUT_S, "torch.compile of GPT2-Medium")
    return Finding(values=child.result())


def compiled(*, device: str, is_small: bool, folder: str) -> dict[str, Any]:
    """Time LoRA's step under `trainer.compile`, and the first step, which compiles."""
    context = Context(device, is_small, Path(folder))
    began = time.perf_counter()
    first_step_s: list[float] = []
    cost = steps.measure(
        context, steps.gpt2(context, steps=4), "lora", epochs=3, compile=True,
        matmul_precision="tf32", at_start=lambda: first_step_s.append(time.perf_counter() - began),
    )  # fmt: skip
    return {"first_step_s": round(first_step_s[0], 1), **cost.facts()}


def _base(context: Context) -> Any:
    size: dict[str, Any] = {"layers": 2, "small": True} if context.is_small else {}
    return models.build("gpt2_medium", context.device, **size).train()


def _fixed_batch(context: Context, model: Any, *, rows: int) -> tuple[Tensor, ...]:
    """Return tokens and positions (M, T), the block mask (1, 1, T, T), loss positions, targets.

    The mask is made once and handed in: `transformers` would read it from the positions, for which
    the host waits for the device.
    """
    total, targets = _size(context)
    sizes = lengths.fill(total, lengths.draw(20, seed=13))
    positions_T = torch.cat([torch.arange(size) for size in sizes])
    document_T = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    mask_TT = (document_T[:, None] == document_T) & torch.ones(total, total).tril().bool()
    draw = torch.Generator().manual_seed(14)
    vocabulary = model.config.vocab_size
    tokens = torch.randint(vocabulary, (rows, total), generator=draw)
    labels = torch.randint(vocabulary, (rows, targets), generator=draw)
    where = torch.arange(total - targets, total)
    batch = (tokens, positions_T.expand(rows, -1), mask_TT[None, None], where, labels)
    return tuple(tensor.contiguous().to(context.device) for tensor in batch)


def _size(context: Context) -> tuple[int, int]:
    """Return the tokens of a row and how many of them are targets."""
    return (96, 20) if context.is_small else (TOKENS, TARGETS)


def _loss(
    model: Any, tokens: Tensor, positions: Tensor, mask: Tensor, where: Tensor, labels: Tensor
) -> Tensor:
    logits = model(
        input_ids=tokens, position_ids=positions, logits_to_keep=where, use_cache=False,
        attention_mask=mask.expand(len(tokens), -1, -1, -1),
    ).logits  # fmt: skip
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="mean")


def _time_steps(context: Context, step: Callable[[], Any]) -> tuple[float, int]:
    """Return the milliseconds of a call, the fastest of three windows, and the peak memory."""
    number = 2 if context.is_small else 5
    if context.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step()
    best = math.inf
    for _ in range(3):
        steps.synchronize(context.device)
        began = time.perf_counter()
        for _ in range(number):
            step()
        steps.synchronize(context.device)
        best = min(best, (time.perf_counter() - began) * 1000 / number)
    peak = torch.cuda.max_memory_allocated() if context.is_cuda else 0
    return best, peak


def mask_difference(context: Context) -> float:
    """Return how far the loss with the mask handed in is from the one by restarting positions."""
    model = _base(context).eval()
    tokens, positions, mask, where, labels = _fixed_batch(context, model, rows=1)
    with torch.no_grad():
        own = _loss(model, tokens, positions, mask, where, labels)
        logits = model(
            input_ids=tokens, position_ids=positions, logits_to_keep=where, use_cache=False
        ).logits
        theirs = F.cross_entropy(logits[0].float(), labels[0])
    return float((own - theirs).abs())

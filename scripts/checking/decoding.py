"""Checks 9 and 10: what a half-precision fit leaves behind, and what beam search costs."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from delta_lora import memory
from delta_lora.trainer import Trainer
from scripts.checking import models, steps, synthetic
from scripts.checking.finding import Context, Finding
from tasks.generation import BeamSearch, Seq2SeqBeamSearch

#: device memory that may still be held when a fit and its model are gone.
LEFT_BYTES = 50_000_000
#: chunks of the test sets: 630 inputs of E2E by 32, 11,334 articles of XSum by 16.
CHUNKS = {"gpt2_medium": 20, "bart_large": 709}
END = 3


def after_bf16(context: Context) -> Finding:
    """Train in bfloat16, decode in float32, and look what is left of the model."""
    finding = Finding()
    _warm_up(context.device)
    before = _allocated(context.device)
    values, model = _fit_and_decode(context)
    finding.values = values
    gc.collect()
    finding.values["device_bytes_left"] = left = _allocated(context.device) - before
    finding.equal("forward_is_patched", values["forward_is_patched"], False)
    finding.equal("decoding_is_float32", values["logits_differ"], 0.0)
    finding.at_least("bf16_would_differ", values["logits_differ_in_bf16"], 1e-6)
    finding.equal("model_is_freed", model() is None, True)
    finding.at_most("device_bytes_left", left, LEFT_BYTES)
    return finding


def _fit_and_decode(context: Context) -> tuple[dict[str, Any], weakref.ref[nn.Module]]:
    """Return what was seen and a weak reference to the model, which nothing else holds then."""
    workload = steps.gpt2(context, steps=4)
    total = 2 * workload.steps_per_epoch
    method = models.make_method("delta_lora", workload.model)
    model = workload.build(context.device)
    method.inject(model, projections=None, head=(), total_steps=total, seed=1)
    steps.run(
        context, model, method, synthetic.task(workload.model), workload, total,
        {"precision": "bf16"},
    )  # fmt: skip
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]], device=context.device)
    with torch.no_grad(), method.merged(model) as merged:
        logits = merged(input_ids=ids).logits
        plain = type(merged).forward(merged, input_ids=ids).logits
        search = BeamSearch(num_beams=4, max_new_tokens=8, batch_size=4)
        texts = search.generate(merged, [[5, 6, 7], [8, 9, 10, 11]], [END])
        # What autocast would have made of it: without a difference the test could not fail.
        with torch.autocast(context.device, torch.bfloat16):
            rounded = merged(input_ids=ids).logits
    values = {
        "forward_is_patched": "forward" in vars(model),
        "logits_differ": float((logits.float() - plain.float()).abs().max()),
        "logits_differ_in_bf16": float((rounded.float() - plain.float()).abs().max()),
        "logits_dtype": str(logits.dtype).removeprefix("torch."),
        "texts": len(texts),
    }
    return values, weakref.ref(model)


def _warm_up(device: str) -> None:
    """Let cuBLAS take its workspaces, which stay with the process, before memory is compared."""
    for dtype in (torch.float32, torch.bfloat16):
        left = torch.randn(256, 256, device=device, dtype=dtype, requires_grad=True)
        (left @ left).sum().backward()
    gc.collect()


def _allocated(device: str) -> int:
    """Return the bytes of live tensors on the device; 0 on a CPU, which does not count them."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def beam_search(context: Context) -> Finding:
    """Time the decoding of E2E and XSum, and compare a small model's tokens with a CPU's."""
    finding = Finding()
    on_device, on_cpu = (
        _small_texts(context.device, torch.float32),
        _small_texts("cpu", torch.float64),
    )
    finding.equal("equal_tokens", on_device == on_cpu, True)
    finding.at_least("tokens_compared", sum(map(len, on_cpu)), 100)
    Trainer(batch_size=1, device=context.device).prepare_backend()
    for name, seconds, peak, facts in (_decode_gpt2(context), _decode_bart(context)):
        minutes = seconds * CHUNKS[name] / 60
        finding.values[name] = {
            **facts, "seconds_per_chunk": round(seconds, 3), "peak_bytes": peak,
            "test_set_minutes": round(minutes, 1),
        }  # fmt: skip
        finding.cost(
            "decoding", model=name, seconds=round(seconds, 3), peak_bytes=peak,
            chunks_of_the_test_set=CHUNKS[name], **facts,
        )  # fmt: skip
        context.say(
            f"{name}: {seconds:.2f} s a chunk, peak {peak / 2**30:.1f} GiB, "
            f"{CHUNKS[name]} chunks in {minutes:.0f} min"
        )
        finding.at_least(f"{name}_texts", facts["texts"], 1)
    return finding


def _decode_gpt2(context: Context) -> tuple[str, float, int, dict[str, Any]]:
    size: dict[str, Any] = {"layers": 2, "small": True} if context.is_small else {}
    model = models.build("gpt2_medium", context.device, **size).eval()
    count, beams, new = (4, 2, 8) if context.is_small else (32, 10, 64)
    prompts = [s.tokens[: s.num_context] for s in synthetic.sequences(count, 160, seed=7)]
    search = BeamSearch(num_beams=beams, max_new_tokens=new, batch_size=count)
    seconds, peak, texts = _time(context, partial(search.generate, model, prompts, [END]))
    del model
    steps.clean_up(context.device)
    facts = {"batch_size": count, "num_beams": beams, "new_tokens": new, "texts": texts}
    return "gpt2_medium", seconds, peak, facts


def _decode_bart(context: Context) -> tuple[str, float, int, dict[str, Any]]:
    size: dict[str, Any] = {"layers": 2, "small": True} if context.is_small else {}
    model = models.build("bart_large", context.device, **size).eval()
    count, beams, new, length = (2, 2, 8, 24) if context.is_small else (16, 8, 64, 768)
    sources = [
        torch.as_tensor(pair.source) for pair in synthetic.pairs(count, length, 4, 160, seed=8)
    ]
    search = Seq2SeqBeamSearch(num_beams=beams, max_length=new, batch_size=count)
    seconds, peak, texts = _time(context, partial(search.generate, model, sources))
    del model
    steps.clean_up(context.device)
    facts = {
        "batch_size": count, "num_beams": beams, "new_tokens": new, "source_tokens": length,
        "texts": texts,
    }  # fmt: skip
    return "bart_large", seconds, peak, facts


def _time(context: Context, decode: Callable[[], list[list[int]]]) -> tuple[float, int, int]:
    """Return the seconds of the second call, its peak memory, and the number of texts."""
    decode()
    device = torch.device(context.device)
    memory.reset_peak(device)
    steps.synchronize(context.device)
    began = time.perf_counter()
    texts = decode()
    steps.synchronize(context.device)
    return time.perf_counter() - began, memory.peak_bytes(device), len(texts)


def _small_texts(device: str, dtype: torch.dtype) -> list[list[int]]:
    """Return three chunks of two small models each.

    Weights are drawn wide, so that no two candidates of the search are a rounding apart.
    """
    prompts = [s.tokens[: s.num_context] for s in synthetic.sequences(12, 160, seed=9)]
    sources = [torch.as_tensor(pair.source) for pair in synthetic.pairs(12, 20, 4, 160, seed=10)]
    causal = _small("gpt2_medium", {"initializer_range": 0.2}, device, dtype)
    seq2seq = _small("bart_large", {"init_std": 0.2}, device, dtype)
    search = BeamSearch(num_beams=4, max_new_tokens=16, batch_size=4)
    other = Seq2SeqBeamSearch(num_beams=4, max_length=16, batch_size=4)
    texts: list[list[int]] = []
    for start in range(0, 12, 4):
        chunk = slice(start, start + 4)
        texts += search.generate(causal, prompts[chunk], [END])
        texts += other.generate(seq2seq, sources[chunk])
    return texts


def _small(name: str, values: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    model = models.build(name, "cpu", layers=2, small=True, dropout=0.0, **values)
    return model.to(device, dtype).eval()

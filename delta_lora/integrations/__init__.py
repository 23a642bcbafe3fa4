"""Delta-LoRA inside other people's training loops.

`DeltaLoraCallback` turns an existing PEFT LoRA under `transformers.Trainer` into Delta-LoRA. It is
imported when it is asked for, because `transformers` takes seconds to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delta_lora.integrations.trainer_callback import DeltaLoraCallback

__all__ = ["DeltaLoraCallback"]


def __getattr__(name: str) -> Any:
    """Import `DeltaLoraCallback` at its first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from delta_lora.integrations import trainer_callback

    return getattr(trainer_callback, name)

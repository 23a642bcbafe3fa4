"""Delta-LoRA (arXiv 2309.02411): the method, its relatives, and the loop that trains them.

    adapter = delta_lora.attach(model, method="delta_lora", rank=8, alpha=16)
    adapter.before_step(), adapter.after_step()   # around every optimizer.step()
    adapter.save("folder")
    model = delta_lora.load("folder").model

See `delta_lora.adapter`. Nothing heavy is imported before one of these names is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delta_lora.adapter import Adapter, attach, load

__version__ = "0.1.0"
__all__ = ["Adapter", "__version__", "attach", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Adapter", "attach", "load"):
        return getattr(importlib.import_module("delta_lora.adapter"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]

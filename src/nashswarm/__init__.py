"""Nash-Swarm: mixed-precision quantization of causal language models, with every byte counted.

`nashswarm.load(directory)` gives a packed model back; with this package imported, transformers' own `from_pretrained`
does, too.
"""

from __future__ import annotations

import importlib
from typing import Any

from wrapt import register_post_import_hook

__version__ = "0.1.0"
__all__ = ["load"]

# Named by strings, so that neither torch nor transformers is imported before someone wants it.
register_post_import_hook("nashswarm.plugin:register", "transformers.quantizers.auto")


def __getattr__(name: str) -> Any:
    if name == "load":
        return importlib.import_module("nashswarm.kernels.serving").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""llmrt: fast inference of Hugging Face language models in plain PyTorch, on x86 CPUs and Intel GPUs.

``from llmrt import llm`` for ``llm.optimize``; ``torch.compile(model, backend="llmrt")`` needs no import at all.
Importing llmrt registers its operators as ``torch.ops.llmrt.*`` and changes nothing else in torch or transformers.
"""

import warnings as _warnings

import torch as _torch  # noqa: F401  (its libraries must be loaded before the extension)

from . import _C
from . import ops as ops
from .version import __version__ as __version__

if _C.cpu_isa() == "reference":
    _warnings.warn(
        "llmrt runs its slow Python references: this CPU lacks AVX2 with FMA and F16C, or LLMRT_CPU_ISA=reference is set",
        RuntimeWarning,
        stacklevel=2,
    )

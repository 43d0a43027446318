"""How the rotation of published models was stretched for longer texts, where a file keeps only the result."""

from __future__ import annotations

from typing import Any

#: transformers' parameters of a rotation whose low frequencies are divided by a factor, which the file tells.
STRETCHED_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

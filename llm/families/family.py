"""What a row of the family table says: names and kinds of the parts that have a faster form.

A row never holds code. Every claim of a row is confirmed on the model at hand by a small numeric probe (llm/probe.py) before
anything is replaced, so a row that a new transformers release made wrong costs speed and is reported; it cannot give a
wrong result.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gated:
    """``down(act(gate(x)) * up(x))``, attribute names in one module."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"


@dataclass(frozen=True)
class GatedFused:
    """The same with one linear whose first half of rows is the gate."""

    gate_up: str = "gate_up_proj"
    down: str = "down_proj"
    activation: str = "activation_fn"


@dataclass(frozen=True)
class Plain:
    """``second(act(first(x)))``, attribute names in one module (the feed-forward module or the whole decoder layer)."""

    first: str
    second: str
    activation: str = "act"


Mlp = Gated | GatedFused | Plain


@dataclass(frozen=True)
class Family:
    """One row.

    Args:
        model_type: `config.model_type` of the language model.
        norm: "rms" (weight), "rms_offset" (1 + weight) or "layer".
        rope: "half" pairs (i, i + R/2), "interleaved" pairs (2i, 2i + 1), or None. Partial rotation needs no mark.
        siblings: linears of the attention module that are called with the same input; empty when the checkpoint fuses them.
        mlp: the feed-forward part.
        positions: attribute of the learned position table in the decoder, if there is one.
        rope_function: name by which the attention module's forward calls the rotation.
    """

    model_type: str
    norm: str = "rms"
    rope: str | None = "half"
    siblings: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    mlp: Mlp = Gated()
    positions: str | None = None
    rope_function: str = "apply_rotary_pos_emb"

"""quant_experts beyond the samples: every compute against the linears that it is made of, threads, bad input."""

from typing import Any

import pytest
import torch

from llmrt import ops
from llmrt.ops import FORMATS, Layout

E, H, WIDTH = 3, 96, 40
LAYOUT = Layout("int4", False, 32)


def packed(rows: int, in_features: int, layout: Layout, gated: bool) -> torch.Tensor:
    weights = []
    for _ in range(E):
        weight = torch.randn(2 if gated else 1, rows, in_features) / in_features**0.5
        joined = ops.interleave_gate_up(*weight) if gated else weight[0]
        weights.append(ops.pack_weight(*ops.quantize(joined, layout), str(layout), in_features))
    return torch.stack(weights)


def arguments(
    m: int, layout: Layout = LAYOUT, compute: str = "int8", activation: str = "silu", hidden: int = H
) -> dict[str, Any]:
    return {
        "x": torch.randn(m, hidden), "indices": torch.rand(m, E).topk(2).indices, "scores": torch.rand(m, 2),
        "gate_up": packed(WIDTH, hidden, layout, True), "down": packed(hidden, WIDTH, layout, False), "perm": None, "down_perm": None,
        "layout": str(layout), "down_layout": str(layout), "width": WIDTH, "compute": compute, "down_compute": compute,
        "activation": activation,
    }  # fmt: skip


def by_linears(a: dict[str, Any]) -> torch.Tensor:
    """Return what linears called one expert after the other give, each over the rows that chose it."""
    y = torch.zeros_like(a["x"])
    for e in range(E):
        token, place = torch.where(a["indices"] == e)
        rows = a["x"][token] if a["perm"] is None else a["x"][token][:, a["perm"][e]]
        epilogue = f"{a['activation']}_mul"
        hidden = ops.quant_linear(rows, a["gate_up"][e], None, None, a["layout"], WIDTH, a["compute"], epilogue)
        hidden = hidden if a["down_perm"] is None else hidden[:, a["down_perm"][e]]
        out = ops.quant_linear(hidden, a["down"][e], None, None, a["down_layout"], a["x"].shape[1], a["down_compute"])
        y.index_add_(0, token, a["scores"][token, place, None] * out)
    return y


@pytest.mark.parametrize("row", FORMATS.values(), ids=lambda row: row.name)
def test_every_compute_is_that_of_the_linears(row: Any, isa: str) -> None:
    for number, compute in enumerate(row.computes):
        for m in (1, 7, 40):
            activation = ("silu", "gelu", "gelu_tanh")[(number + m) % 3]
            given = arguments(m, Layout(row.name, False, 32), compute, activation)
            torch.testing.assert_close(ops.quant_experts(**given), by_linears(given), rtol=1e-6, atol=1e-6)


def test_orders_of_columns(isa: str) -> None:
    given = arguments(9)
    given.update(perm=torch.rand(E, H).argsort(-1).int(), down_perm=torch.rand(E, WIDTH).argsort(-1).int())
    torch.testing.assert_close(ops.quant_experts(**given), by_linears(given), rtol=1e-6, atol=1e-6)
    half = {**given, "x": given["x"].bfloat16()}
    expected = by_linears({**given, "x": half["x"].float()})
    torch.testing.assert_close(ops.quant_experts(**half).float(), expected, rtol=2**-8, atol=1e-6)


def test_thread_count_does_not_change_the_bits(isa: str) -> None:
    given, threads, results = arguments(50), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(ops.quant_experts(**given))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_token_depends_on_its_experts_alone(isa: str) -> None:
    """A NaN in one token stays where it is."""
    given = arguments(4)
    given["indices"] = torch.tensor([[0, 1], [1, 0], [2, 0], [0, 1]])
    clean = ops.quant_experts(**given)
    given["x"][2] = torch.nan
    y = ops.quant_experts(**given)
    assert y[2].isnan().all() and torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, H, dtype=torch.int64)}, "x has dtype int64; valid: float32, bfloat16, float16"),
        ({"x": torch.randn(1, 2, H)}, r"x has shape \[1, 2, 96\]; expected \[any, any\]"),
        ({"x": torch.randn(2, 300)}, r"gate_up has shape"),
        ({"indices": torch.zeros(2, 2)}, "indices has dtype float32; expected int64"),
        ({"indices": torch.zeros(3, 2, dtype=torch.int64)}, r"indices has shape \[3, 2\]; expected \[2, any\]"),
        ({"indices": torch.tensor([[0, 1], [3, 0]])}, "indices has the value 3; valid: 0 to 2"),
        ({"indices": torch.tensor([[0, -1], [1, 0]])}, "indices has the value -1; valid: 0 to 2"),
        ({"scores": torch.rand(2, 3)}, r"scores has shape \[2, 3\]; expected \[2, 2\]"),
        ({"scores": torch.ones(2, 2, dtype=torch.int32)}, "scores has dtype int32"),
        ({"gate_up": torch.zeros(3, 3, 1, 2304)}, "gate_up has dtype float32; expected uint8"),
        ({"width": 50}, r"gate_up has shape"),
        ({"width": 0}, "width is 0; valid: at least 1"),
        ({"down": packed(H, WIDTH, LAYOUT, False)[:2]}, "down has 2 experts; expected those of gate_up, 3"),
        ({"down_layout": "int8_sym_g32_bf16"}, "down has shape"),
        ({"layout": "int4"}, "layout is 'int4'; expected the form"),
        ({"compute": "int7"}, "compute is 'int7'; valid: int8, bf16, fp16, fp32"),
        ({"activation": "relu"}, "activation is 'relu'; valid: silu, gelu, gelu_tanh"),
        ({"perm": torch.zeros(E, H, dtype=torch.int64)}, "perm has dtype int64; expected int32"),
        ({"down_perm": torch.zeros(E, H).int()}, r"down_perm has shape \[3, 96\]; expected \[3, 40\]"),
        ({"perm": torch.full((E, H), H).int()}, "perm has the value 96; valid: 0 to 95"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str, isa: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.quant_experts(**{**arguments(2), **change})


@pytest.mark.parametrize("ordered", [False, True], ids=["in order", "ordered"])
def test_the_experts_of_one_token_side_by_side(ordered: bool, isa: str) -> None:
    """Its experts run side by side, here also more bytes of inputs than each thread prepares for itself."""
    for hidden, compute, dtype in (
        (96, "int8", torch.bfloat16),
        (12000, "fp32", torch.float32),
        (96, "bf16", torch.float32),
    ):
        given = arguments(1, compute=compute, hidden=hidden)
        if ordered:
            given.update(perm=torch.rand(E, hidden).argsort(-1).int(), down_perm=torch.rand(E, WIDTH).argsort(-1).int())
        given["indices"] = torch.tensor([[2, 0, 2]])
        given["scores"], given["x"] = torch.rand(1, 3), given["x"].to(dtype)
        expected = by_linears({**given, "x": given["x"].float()})
        tolerance = {"rtol": 2**-8, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(ops.quant_experts(**given).float(), expected, **tolerance)

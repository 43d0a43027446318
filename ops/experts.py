"""The experts of a mixture-of-experts layer over packed weights, in one operator: which experts run depends on data."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .check import check, check_dtype, check_floating, check_shape, differ
from .formats import COMPUTES, TILE_N, Layout, interleave_gate_up, quantize
from .linear import LAYOUTS, pack_weight, quant_linear
from .norm import wide
from .operator import Sample, operator

#: Activations of the gate.
EXPERT_ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def _check_weight(
    packed: Tensor, layout: str, compute: str, rows: int, in_features: int, perm: Tensor | None, name: str
) -> None:
    form = Layout.parse(layout)
    check(compute in COMPUTES, f"compute is {compute!r}; valid: {', '.join(COMPUTES)}")
    row = form.format
    check(compute in row.computes, f"compute is {compute!r} for {row.name}; valid: {', '.join(row.computes)}")
    sizes = form.geometry(in_features)
    check_dtype(packed, torch.uint8, name)
    check_shape(packed, (-1, -(-rows // TILE_N), sizes.tiles, sizes.tile_bytes), name)
    if perm is not None:
        perm_name = "perm" if name == "gate_up" else f"{name}_perm"
        check_dtype(perm, torch.int32, perm_name)
        check_shape(perm, (packed.shape[0], in_features), perm_name)


def _check(
    x: Tensor,
    indices: Tensor,
    scores: Tensor,
    gate_up: Tensor,
    down: Tensor,
    perm: Tensor | None,
    down_perm: Tensor | None,
    layouts: tuple[str, str],
    width: int,
    computes: tuple[str, str],
    activation: str,
) -> None:
    check_floating(x, "x")
    check_shape(x, (-1, -1), "x")
    check_dtype(indices, torch.int64, "indices")
    check_shape(indices, (x.shape[0], -1), "indices")
    check_floating(scores, "scores")
    check_shape(scores, indices.shape, "scores")
    check(width >= 1, f"width is {width}; valid: at least 1")
    check(activation in EXPERT_ACTIVATIONS, f"activation is '{activation}'; valid: {', '.join(EXPERT_ACTIVATIONS)}")
    rows = 2 * (-(-width // 16) * 16)
    _check_weight(gate_up, layouts[0], computes[0], rows, x.shape[1], perm, "gate_up")
    _check_weight(down, layouts[1], computes[1], x.shape[1], width, down_perm, "down")
    experts = gate_up.shape[0]
    check(
        not differ(down.shape[0], experts),
        f"down has {down.shape[0]} experts; expected those of gate_up, {experts}",
    )


@operator()
def quant_experts(
    x: Tensor,
    indices: Tensor,
    scores: Tensor,
    gate_up: Tensor,
    down: Tensor,
    perm: Tensor | None,
    down_perm: Tensor | None,
    layout: str,
    down_layout: str,
    width: int,
    compute: str = "int8",
    down_compute: str = "int8",
    activation: str = "silu",
) -> Tensor:
    """Experts chosen by token: ``y[m] = sum_j scores[m, j] * down_e(act(gate_e(x[m])) * up_e(x[m]))``, e = indices[m, j].

    Each product is that of `quant_linear`; what is between them and the sum are float32, rounded once at the end. Source: Shazeer et al.
    2017, "Outrageously Large Neural Networks", equation 1, with feed-forward parts as experts (Jiang et al. 2024, "Mixtral of Experts",
    section 2.1).

    Args:
        x: [M, H] float32, bfloat16 or float16.
        indices: int64 [M, k], experts of each token, 0 .. E - 1.
        scores: [M, k], any floating dtype.
        gate_up: uint8 [E, ceil(2 * ceil16(I) / 32), tiles, tile_bytes], packed weights whose rows come from `interleave_gate_up`.
        down: uint8 [E, ceil(H / 32), tiles, tile_bytes].
        perm: int32 [E, H] or None: column k of expert e's gate and up multiplies feature perm[e, k] of x.
        down_perm: int32 [E, I] or None: the same of down.
        layout: of gate_up, text of a `Layout`.
        down_layout: of down.
        width: I, the rows of one gate.
        compute: of gate_up: int8, bf16, fp16 or fp32; floats of 8 bits have no int8.
        down_compute: of down.
        activation: silu, gelu or gelu_tanh.

    Returns:
        [M, H] in the dtype of x.

    Raises:
        RuntimeError: an argument does not fit, with its name, its value and what is valid.
    """
    layouts, computes = (layout, down_layout), (compute, down_compute)
    _check(x, indices, scores, gate_up, down, perm, down_perm, layouts, width, computes, activation)
    check_values(indices, perm, down_perm, gate_up.shape[0])
    v = wide(x)
    y = v.new_zeros(x.shape)
    for expert in indices.unique().tolist():
        token, place = torch.where(indices == expert)
        rows = v[token] if perm is None else v[token][:, perm[expert]]
        hidden = quant_linear.reference(rows, gate_up[expert], None, None, layout, width, compute, f"{activation}_mul")
        hidden = hidden if down_perm is None else hidden[:, down_perm[expert]]
        out = quant_linear.reference(hidden, down[expert], None, None, down_layout, x.shape[1], down_compute)
        y.index_add_(0, token, scores[token, place, None].to(v.dtype) * out)
    return y.to(x.dtype)


def check_values(indices: Tensor, perm: Tensor | None, down_perm: Tensor | None, experts: int) -> None:
    """Raise RuntimeError where an expert or a feature does not exist; a device has to be waited for to see it."""
    for name, order in (("perm", perm), ("down_perm", down_perm)):
        _check_values(order, 0 if order is None else order.shape[1], name)
    _check_values(indices, experts, "indices")


def _check_values(values: Tensor | None, count: int, name: str) -> None:
    wrong = values[(values < 0) | (values >= count)] if values is not None else None
    if wrong is not None and wrong.numel():
        raise RuntimeError(f"{name} has the value {int(wrong[0])}; valid: 0 to {count - 1}")


@quant_experts.fake
def _(
    x: Tensor,
    indices: Tensor,
    scores: Tensor,
    gate_up: Tensor,
    down: Tensor,
    perm: Tensor | None,
    down_perm: Tensor | None,
    layout: str,
    down_layout: str,
    width: int,
    compute: str = "int8",
    down_compute: str = "int8",
    activation: str = "silu",
) -> Tensor:
    layouts, computes = (layout, down_layout), (compute, down_compute)
    _check(x, indices, scores, gate_up, down, perm, down_perm, layouts, width, computes, activation)
    return x.new_empty(x.shape)


def _packed(experts: int, rows: int, in_features: int, layout: Layout, gated: bool) -> Tensor:
    def one() -> Tensor:
        return torch.randn(rows, in_features) / in_features**0.5

    weights = [interleave_gate_up(one(), one()) if gated else one() for _ in range(experts)]
    return torch.stack([pack_weight.reference(*quantize(w, layout), str(layout), in_features) for w in weights])


def _sample(
    m: int, k: int, sizes: tuple[int, int, int], layouts: tuple[Layout, Layout], computes: tuple[str, str],
    activation: str, dtype: torch.dtype, permuted: bool = False,
) -> Sample:  # fmt: skip
    experts, hidden, width = sizes
    x = torch.randn(m, hidden, dtype=dtype)
    chosen = torch.rand(m, experts).topk(k).indices
    scores = torch.rand(m, k, dtype=dtype if hidden % 2 else torch.float32)
    gate_up, down = (
        _packed(experts, width, hidden, layouts[0], True),
        _packed(experts, hidden, width, layouts[1], False),
    )
    perms = [torch.rand(experts, n).argsort(-1).int() if permuted and n % 5 else None for n in (hidden, width)]
    return Sample(
        f"{m} tokens, {k} of {sizes} {layouts[0]} {layouts[1]} {computes} {activation}",
        (x, chosen, scores, gate_up, down, *perms, *map(str, layouts), width, *computes, activation),
    )


@quant_experts.samples
def _(dtype: torch.dtype) -> Iterator[Sample]:
    # What down rounds to 8 or 16 bits differs by one step between float32 and float64 now and then: only wider tolerances cover that.
    seconds = ("fp32", "fp16") if dtype == torch.float32 else ("fp32", "bf16", "int8")
    cases = (((4, 64, 48), 2), ((3, 131, 20), 1), ((5, 96, 40), 3), ((1, 33, 16), 1))
    layouts = LAYOUTS[::3]
    for i, first in enumerate(layouts):
        second = layouts[(i + 2) % len(layouts)]
        down = next(c for c in (*seconds[i % len(seconds) :], "fp32") if c in second.format.computes)
        up = first.format.computes[i % len(first.format.computes)]
        sizes, k = cases[i % len(cases)]
        activation = EXPERT_ACTIVATIONS[i % 3]
        yield _sample((1, 5, 14)[i // 2 % 3], k, sizes, (first, second), (up, down), activation, dtype, i % 4 == 1)
    plain = _sample(6, 2, cases[0][0], (LAYOUTS[0], LAYOUTS[0]), ("int8", "fp32"), "silu", dtype)
    x, chosen, scores, *rest = plain.args
    yield plain
    yield Sample("no token", (x[:0], chosen[:0], scores[:0], *rest))
    yield Sample("no expert", (x, chosen[:, :0], scores[:, :0], *rest))
    yield Sample("one expert twice", (x, chosen[:, :1].expand(-1, 2), scores, *rest))
    wide_x = torch.randn(6, 128, dtype=dtype)
    yield Sample("strided", (wide_x[:, 32:96], chosen.t().contiguous().t(), scores, *rest))

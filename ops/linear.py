"""Weight-only quantized linear: packing, unpacking and the fused product."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import gelu, pad, relu, silu

from .check import check, check_dtype, check_floating, check_shape
from .formats import (
    COMPUTES,
    FORMATS,
    SCALE_DTYPES,
    TILE_K,
    TILE_N,
    Geometry,
    Layout,
    check_canonical,
    check_finite,
    dequantize,
    interleave_gate_up,
    join_codes,
    quantize,
    split_codes,
)
from .norm import wide
from .operator import Sample, operator

EPILOGUES = ("none", "relu", "silu", "gelu", "gelu_tanh", "add", "mul", "silu_mul", "gelu_mul", "gelu_tanh_mul")
GATED = ("silu_mul", "gelu_mul", "gelu_tanh_mul")


def _pad_groups(x: Tensor, sizes: Geometry) -> Tensor:
    """[N, K] -> [N, tiles * 128]: every group padded to its padded size with zeros."""
    x = pad(x, (0, sizes.groups * sizes.group - x.shape[1])).view(-1, sizes.groups, sizes.group)
    x = pad(x, (0, sizes.padded_group - sizes.group)).flatten(1)
    return pad(x, (0, sizes.tiles * TILE_K - x.shape[1]))


def _unpad_groups(x: Tensor, sizes: Geometry, in_features: int) -> Tensor:
    x = x[:, : sizes.groups * sizes.padded_group].reshape(-1, sizes.groups, sizes.padded_group)
    return x[:, :, : sizes.group].flatten(1)[:, :in_features]


def _pad_segments(x: Tensor, sizes: Geometry) -> Tensor:
    """[N, G] -> [ceil(N / 32), tiles, segments * 32]: one value per output and segment."""
    x = x.repeat_interleave(sizes.padded_group // sizes.segment, -1)
    x = pad(x, (0, sizes.tiles * sizes.segments - x.shape[1], 0, -x.shape[0] % TILE_N))
    return (
        x.view(-1, TILE_N, sizes.tiles, sizes.segments)
        .permute(0, 2, 3, 1)
        .reshape(-1, sizes.tiles, sizes.segments * TILE_N)
    )


def _unpad_segments(x: Tensor, sizes: Geometry, out_features: int) -> Tensor:
    x = x.view(-1, sizes.tiles, sizes.segments, TILE_N).permute(0, 3, 1, 2).reshape(-1, sizes.tiles * sizes.segments)
    return x[:out_features, :: sizes.padded_group // sizes.segment][:, : sizes.groups]


@operator(exact=True)
def pack_weight(codes: Tensor, scales: Tensor, zeros: Tensor | None, layout: str, in_features: int) -> Tensor:
    """Return the packed form of a canonical weight (see ops/formats.py): tiles of 32 outputs x 128 inputs.

    A tile is rows of 64 bytes. 8 bit: row 2 * k4 + half holds outputs 16 * half .. + 15 with 4 bytes each, inputs 4 * k4 .. + 3.
    4 bit: row 2 * k8 + half, the low nibbles of an output's 4 bytes are inputs 8 * k8 .. + 3, the high ones + 4 .. + 7. Behind the
    codes stand the scales [segments][32] and, if asymmetric, the zeros, uint8 [segments][32]; the codes and scales of outputs and
    inputs that do not exist are bytes of 0.

    Args:
        codes: uint8 [N, ceil(K * bits / 8)].
        scales: [N, G], finite, of the layout's scale dtype; so are the values of codes that are floats.
        zeros: uint8 [N, G] when the layout is asymmetric, else None.
        layout: text of a `Layout`.
        in_features: K.

    Returns:
        uint8 [ceil(N / 32), tiles, tile_bytes].

    Raises:
        RuntimeError: a tensor does not fit the layout, or a scale or a code of floats is NaN or infinite.
    """
    form = Layout.parse(layout)
    sizes = check_canonical(codes, scales, zeros, form, in_features)
    check_finite(codes, scales, form)
    x = pad(_pad_groups(split_codes(codes, form.format.bits, in_features), sizes), (0, 0, 0, -codes.shape[0] % TILE_N))
    blocks = x.shape[0] // TILE_N
    if form.format.bits == 4:
        x = x.view(blocks, 2, 16, sizes.tiles, 16, 2, 4)
        x = x[..., 0, :] | (x[..., 1, :] << 4)
    else:
        x = x.view(blocks, 2, 16, sizes.tiles, 32, 4)
    parts = [x.permute(0, 3, 4, 1, 2, 5).reshape(blocks, sizes.tiles, sizes.code_bytes)]
    stored = scales.view(torch.uint8) if scales.itemsize == 1 else scales  # torch cannot pad float8_e8m0fnu
    parts.append(_pad_segments(stored, sizes).contiguous().view(torch.uint8))
    if zeros is not None:
        parts.append(_pad_segments(zeros, sizes))
    packed = torch.cat(parts, -1)
    return pad(packed, (0, sizes.tile_bytes - packed.shape[-1]))


@pack_weight.fake
def _(codes: Tensor, scales: Tensor, zeros: Tensor | None, layout: str, in_features: int) -> Tensor:
    sizes = check_canonical(codes, scales, zeros, Layout.parse(layout), in_features)
    return codes.new_empty((-(-codes.shape[0] // TILE_N), sizes.tiles, sizes.tile_bytes))


def _check_packed(packed: Tensor, layout: str, rows: int, in_features: int, name: str) -> Geometry:
    sizes = Layout.parse(layout).geometry(in_features)
    check_dtype(packed, torch.uint8, name)
    check_shape(packed, (-(-rows // TILE_N), sizes.tiles, sizes.tile_bytes), name)
    return sizes


@operator(exact=True)
def unpack_weight(packed: Tensor, layout: str, out_features: int, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the canonical weight of a packed one, exactly: (codes, scales, zeros); zeros is [N, 0] when symmetric.

    Args:
        packed: uint8 [ceil(N / 32), tiles, tile_bytes].
        layout: text of a `Layout`.
        out_features: N.
        in_features: K.

    Raises:
        RuntimeError: packed has another shape than these sizes ask for.
    """
    form, sizes = Layout.parse(layout), _check_packed(packed, layout, out_features, in_features, "packed")
    x = (
        packed[..., : sizes.code_bytes]
        .reshape(-1, sizes.tiles, sizes.code_bytes // 128, 2, 16, 4)
        .permute(0, 3, 4, 1, 2, 5)
    )
    if form.format.bits == 4:
        x = torch.stack((x & 15, x >> 4), -2)
    x = x.reshape(-1, sizes.tiles * TILE_K)[:out_features]
    codes = join_codes(_unpad_groups(x, sizes, in_features), form.format.bits)
    scales = packed[..., sizes.code_bytes : sizes.code_bytes + sizes.scale_bytes].contiguous().view(form.scale_dtype)
    zeros = packed.new_empty((out_features, 0))
    if form.asymmetric:
        start = sizes.code_bytes + sizes.scale_bytes
        zeros = packed[..., start : start + sizes.segments * TILE_N].contiguous()
        zeros = _unpad_segments(zeros, sizes, out_features)
    scales = _unpad_segments(scales, sizes, out_features)
    own = torch.contiguous_format  # copies, as no result may be a view of an argument
    return codes.clone(memory_format=own), scales.clone(memory_format=own), zeros.clone(memory_format=own)


@unpack_weight.fake
def _(packed: Tensor, layout: str, out_features: int, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    form, sizes = Layout.parse(layout), _check_packed(packed, layout, out_features, in_features, "packed")
    codes = packed.new_empty((out_features, -(-in_features * form.format.bits // 8)))
    scales = packed.new_empty((out_features, sizes.groups), dtype=form.scale_dtype)
    return codes, scales, packed.new_empty((out_features, sizes.groups if form.asymmetric else 0))


def quantize_activations(x: Tensor, sizes: Geometry) -> Tensor:
    """Return x [M, K] as the int8 kernels see it: rounded to 255 levels per row and segment of the packed weight.

    scale = absmax / 127 and code = round(x * (127 / absmax)), both in float32, as the kernels do, so that codes agree. Segments whose
    absmax is below 2^-118 count as 0.
    """
    form = _pad_groups(x.float(), sizes).view(x.shape[0], sizes.tiles * sizes.segments, sizes.segment)
    largest = form.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest < 2.0**-118, 0.0, torch.full_like(largest, 127.0) / largest)
    codes = torch.round(form * inverse).clamp(-127, 127)
    values = codes.to(x.dtype) * (largest / 127.0).to(x.dtype)
    return _unpad_groups(values.flatten(1), sizes, x.shape[1])


def activate(y: Tensor, epilogue: str) -> Tensor:
    """Return the activation of an epilogue's name, that of the gate for the gated ones."""
    name = epilogue.removesuffix("_mul")
    if name == "gelu_tanh":
        return gelu(y, approximate="tanh")
    return silu(y) if name == "silu" else relu(y) if name == "relu" else gelu(y)


def _check_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    layout: str,
    out_features: int,
    compute: str,
    epilogue: str,
) -> tuple[Geometry, int]:
    check_floating(x, "x")
    check(x.dim() >= 1, "x is a scalar; expected [..., K]")
    check(compute in COMPUTES, f"compute is {compute!r}; valid: {', '.join(COMPUTES)}")
    row = Layout.parse(layout).format
    check(compute in row.computes, f"compute is {compute!r} for {row.name}; valid: {', '.join(row.computes)}")
    check(epilogue in EPILOGUES, f"epilogue is {epilogue!r}; valid: {', '.join(EPILOGUES)}")
    rows = 2 * (-(-out_features // 16) * 16) if epilogue in GATED else out_features
    sizes = _check_packed(weight, layout, rows, x.shape[-1], "weight")
    if bias is not None:
        check_floating(bias, "bias")
        check_shape(bias, (rows,), "bias")
    check(
        (other is not None) == (epilogue in ("add", "mul")),
        f"other {'missing' if other is None else 'given'} for epilogue {epilogue!r}",
    )
    if other is not None:
        check_shape(other, (*x.shape[:-1], out_features), "other")
        check(other.dtype == x.dtype, f"other has dtype {str(other.dtype)[6:]}; expected that of x, {str(x.dtype)[6:]}")
    return sizes, rows


@operator()
def quant_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    layout: str,
    out_features: int,
    compute: str = "int8",
    epilogue: str = "none",
) -> Tensor:
    """Linear layer over a packed weight: ``y = epilogue(x @ dequantize(weight).T + bias)``, rounded once at the end.

    With compute "int8", x is first rounded to 8 bits per row and segment (`quantize_activations`), products and the sums of a
    segment are exact integers and C[m, n] = sum_g sA[m, g] * sW[n, g] * (sum_k qA * qW - zW[n, g] * sum_k qA) in float32 (the
    algebra of ONNX Runtime's MLAS). "bf16": x is rounded to bfloat16. "fp32" and "fp16": float32 arithmetic. Codes enter
    the product exactly, except those of nf4: as multiples of 1/127 in "int8", as bfloat16 in "bf16" (`Format.values`).

    Args:
        x: [..., K] float32, bfloat16 or float16.
        weight: uint8 [ceil(N / 32), tiles, tile_bytes] from `pack_weight`.
        bias: [N], any floating dtype, or None.
        other: [..., out_features] in the dtype of x, for the epilogues add and mul; else None.
        layout: text of a `Layout`.
        out_features: width of the output. N, or for the gated epilogues half of the weight's rows.
        compute: int8, bf16, fp16 or fp32; floats of 8 bits have no int8.
        epilogue: none; relu, silu, gelu, gelu_tanh; add, mul (with `other`); silu_mul, gelu_mul, gelu_tanh_mul: act(gate) * up of a
            weight whose rows (and bias) come from `interleave_gate_up`.

    Returns:
        [..., out_features] in the dtype of x.

    Raises:
        RuntimeError: an argument does not fit, with its name, its value and what is valid.
    """
    sizes, rows = _check_linear(x, weight, bias, other, layout, out_features, compute, epilogue)
    codes, scales, zeros = unpack_weight.reference(weight, layout, rows, x.shape[-1])
    v = wide(x).flatten(0, -2) if x.dim() > 1 else wide(x).unsqueeze(0)
    form = Layout.parse(layout)
    w = dequantize(codes, scales.to(v.dtype), zeros if form.asymmetric else None, form, x.shape[-1], compute)
    v = quantize_activations(v, sizes) if compute == "int8" else v.bfloat16().to(v.dtype) if compute == "bf16" else v
    y = v @ w.T
    if bias is not None:
        y = y + bias.to(y.dtype)
    if epilogue in GATED:
        gate, up = y.view(-1, rows // 32, 2, 16).unbind(2)
        y = (activate(gate, epilogue) * up).flatten(1)[:, :out_features]
    elif other is not None:
        y = y + other.reshape(y.shape) if epilogue == "add" else y * other.reshape(y.shape)
    elif epilogue != "none":
        y = activate(y, epilogue)
    return y.reshape(*x.shape[:-1], out_features).to(x.dtype)


@quant_linear.fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    layout: str,
    out_features: int,
    compute: str = "int8",
    epilogue: str = "none",
) -> Tensor:
    _check_linear(x, weight, bias, other, layout, out_features, compute, epilogue)
    return x.new_empty((*x.shape[:-1], out_features))


def _weight(n: int, k: int, layout: Layout) -> tuple[Tensor, Tensor, Tensor | None]:
    return quantize(torch.randn(n, k) / k**0.5, layout)


_GROUPS = ((32, "bf16"), (64, "f16"), (128, "bf16"), (-1, "f32"), (100, "f32"))
LAYOUTS = tuple(
    Layout(name, asymmetric, group, SCALE_DTYPES[scale])
    for name, row in FORMATS.items()
    for asymmetric in ((False, True) if row.integer else (False,))
    for group, scale in (*_GROUPS, *(((32, "e8m0"), (-1, "e8m0")) if "e8m0" in row.scale_names else ()))
)


@pack_weight.samples
def _(dtype: torch.dtype) -> Iterator[Sample]:
    if dtype != torch.float32:
        return
    for layout in LAYOUTS:
        for n, k in ((32, 128), (7, 300), (65, 131), (1, 9)):
            yield Sample(f"{layout} {n}x{k}", (*_weight(n, k, layout), str(layout), k))


@unpack_weight.samples
def _(dtype: torch.dtype) -> Iterator[Sample]:
    for sample in pack_weight.sample_inputs(dtype):
        codes, _, _, layout, k = sample.args
        yield Sample(sample.name, (pack_weight.reference(*sample.args), layout, codes.shape[0], k))


def _linear_sample(
    m: tuple[int, ...], n: int, k: int, layout: Layout, dtype: torch.dtype, compute: str, epilogue: str, bias: bool
) -> Sample:
    gated = epilogue in GATED
    rows = n
    if gated:
        gate, up = torch.randn(n, k) / k**0.5, torch.randn(n, k) / k**0.5
        canonical = quantize(interleave_gate_up(gate, up), layout)
        rows = 2 * (-(-n // 16) * 16)
    else:
        canonical = _weight(n, k, layout)
    packed = pack_weight.reference(*canonical, str(layout), k)
    other = torch.randn(*m, n, dtype=dtype) if epilogue in ("add", "mul") else None
    b = torch.randn(rows, dtype=dtype if n % 2 else torch.float32) if bias else None
    return Sample(
        f"{layout} {m}x{n}x{k} {compute} {epilogue}",
        (torch.randn(*m, k, dtype=dtype), packed, b, other, str(layout), n, compute, epilogue),
    )


@quant_linear.samples
def _(dtype: torch.dtype) -> Iterator[Sample]:
    shapes = (((1,), 33, 256), ((2, 3), 64, 300), ((13,), 7, 131), ((1, 40), 96, 128))
    for i, layout in enumerate(LAYOUTS):
        for j, compute in enumerate(layout.format.computes):
            m, n, k = shapes[(i + j) % len(shapes)]
            yield _linear_sample(m, n, k, layout, dtype, compute, "none", bool((i + j) % 2))
    for i, epilogue in enumerate(EPILOGUES):
        layout = LAYOUTS[(3 * i) % len(LAYOUTS)]
        yield _linear_sample((1 + 5 * i,), 40 + i, 160, layout, dtype, "int8", epilogue, bool(i % 2))
        yield _linear_sample((3,), 24 + i, 64, layout, dtype, "fp16", epilogue, bool(i % 3))
    if dtype == torch.bfloat16:
        for i, layout in enumerate(
            one for one in LAYOUTS if "int8" in one.format.computes
        ):  # one row has its own kernel
            yield _linear_sample(
                (1,), 40, 300, layout, dtype, "int8", ("none", "silu", "add", "silu_mul")[i % 4], i % 3 == 0
            )
    floats = [layout for layout in LAYOUTS if layout.format.dtype is not None]
    for i, epilogue in enumerate(EPILOGUES):
        layout, compute = floats[(3 * i) % len(floats)], ("bf16", "fp16")[i % 2]
        yield _linear_sample((1 + 4 * i,), 40 + i, 160, layout, dtype, compute, epilogue, bool(i % 3))
    for m in (*range(1, 13), 25, 150, 0):
        yield _linear_sample((m,), 48, 256, LAYOUTS[(0, 2, 8, 12)[m % 4]], dtype, "int8", "none", False)
    strided = _linear_sample((4,), 32, 160, LAYOUTS[2], dtype, "int8", "none", False)
    yield Sample("row stride", (torch.randn(4, 320, dtype=dtype)[:, :160], *strided.args[1:]))

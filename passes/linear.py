"""Linear layers whose weight the graph dequantizes at every call become `quant_linear` over a weight that is packed once.

The weight must follow from parameters and buffers alone. What matters is its last steps: a product of integers (codes, or codes
minus zeros, however they were unpacked) and scales, then views, selections and casts. Both factors are computed once with the
real tensors, and the groups that share a scale are read off them; so the ways of packing need no patterns of their own. Inputs that
were reordered before quantization (act-order) make the groups irregular; a permutation of x then makes them regular.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .. import ops
from ..ops.formats import join_codes
from .folding import Fold, Static, Subgraph, Unfoldable
from .matching import Miss
from .nodes import VIEWS, arguments, aten, insert_call, is_call, known_equal, replace, val
from .rewrite import GraphRewrite, RewriteReport

NAME = "dequantize + linear"
PRODUCTS = (aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default)
#: Calls whose result holds elements of their first argument, not changed.
SELECTIONS = (*VIEWS, aten.index_select.default, aten.index.Tensor, aten.flip.default, aten.clone.default)
#: Activation dtype -> compute. No loss beyond the model's own: bfloat16 activations enter bfloat16 products exactly.
COMPUTE = {torch.bfloat16: "bf16", torch.float16: "fp32", torch.float32: "fp32"}
LEAST_GROUP = 8
#: Rows of a weight that are looked at together, so that what is computed of them stays in the cache.
ROWS = 128
#: codes, scales and zeros, see ops/formats.py.
Canonical = tuple[Tensor, Tensor, Tensor | None]


@dataclass
class Product:
    """A matrix product ``x @ weight`` (+ bias), in the graph's own terms.

    Attributes:
        weight: [K, N], or [N, K] if `rows`.
        rows: whether the weight has a row per output feature.
        absorbed: later calls that the new operator does as well, with the index of the argument that is the product.
    """

    node: Node
    x: Node
    weight: Node
    bias: Node | None
    rows: bool
    absorbed: list[tuple[Node, int]]


@dataclass
class Factors:
    """A weight as the product of integers and scales, each [N, K].

    Attributes:
        part: the computation of all of them.
        integers: code - zero.
        zeros: or None if the integers are not a difference.
        weight: as the model computes it.
        casts: dtypes that the weight takes after the product, in order.
        scale_dtype: the narrowest dtype that the scales came from.
        inner: nodes of the graph whose only use is this weight.
    """

    part: Subgraph
    integers: Node
    scales: Node
    zeros: Node | None
    weight: Node
    casts: list[torch.dtype]
    scale_dtype: torch.dtype
    inner: list[Node]


def product_of(node: Node) -> Product | None:
    """Return what a call multiplies, if it can be a linear layer."""
    if not is_call(node, *PRODUCTS):
        return None
    full = arguments(node)
    if node.target == aten.addmm.default:
        bias, x, weight, beta, alpha = full
        if beta != 1 or alpha != 1 or val(bias).dim() != 1 or not known_equal(val(bias).shape[0], val(node).shape[1]):
            return None
    else:
        x, weight = full[:2]
        bias = full[2] if node.target == aten.linear.default else None
    if val(weight).dim() != 2 or val(x).dim() < 1:
        return None
    return Product(node, x, weight, bias, node.target == aten.linear.default, [])


def _peel(node: Node) -> tuple[list[Node], Node]:
    """Return the selections and casts that end in a node, last first, and what they start from."""
    path = []
    while is_call(node, *SELECTIONS, aten.to.dtype):
        path.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return path, node


def _is_integral(node: Any) -> bool:
    """Return whether a value has an integer dtype, or is a float that was one, maybe minus something."""
    if not isinstance(node, Node):
        return False
    _, start = _peel(node)
    if is_call(start, aten.sub.Tensor, aten.add.Tensor):
        return any(_is_integral(x) for x in start.args[:2])
    return not val(start).is_floating_point()


def _narrowest(node: Node) -> torch.dtype:
    """Return the narrowest floating dtype that a value had."""
    path, start = _peel(node)
    dtypes = [val(x).dtype for x in (*path, start) if val(x).is_floating_point()]
    return min(dtypes, key=lambda dtype: dtype.itemsize)


def _spread(part: Subgraph, value: Node, shape: Sequence[int], path: Sequence[Node]) -> Node:
    """Return a factor broadcast to the product's shape and moved as the product is."""
    value = part.graph.call_function(aten.expand.default, (value, list(shape)))
    for node in reversed(path):
        if node.target != aten.to.dtype:
            value = part.again(node, value)
    return value


def _by_output(part: Subgraph, value: Node, rows: bool) -> Node:
    return value if rows else part.graph.call_function(aten.permute.default, (value, [1, 0]))


def factors_of(product: Product, static: Static) -> Factors:
    """Return the factors of a product's weight.

    Raises:
        Unfoldable: the weight has no such factors.
    """
    path, start = _peel(product.weight)
    if is_call(start, aten.mul.Tensor):
        return _factors_of_weight(product, static, path, start)
    if val(start).is_floating_point():
        raise Unfoldable(f"the weight comes from {start.target} and is no product of codes and scales")
    return _factors_of_output(product, static, path)


def _factors_of_weight(product: Product, static: Static, path: list[Node], start: Node) -> Factors:
    """Factors of W = (codes - zeros) * scales."""
    integral = [_is_integral(x) for x in start.args[:2]]
    if sum(integral) != 1:
        raise Unfoldable("no factor of the weight has integer codes" if not any(integral) else "both factors are codes")
    integers, scales = start.args[:2] if integral[0] else reversed(start.args[:2])
    if not isinstance(scales, Node):
        raise Unfoldable(f"the scale is the number {scales}")
    part, rows = Subgraph(static), product.rows

    def spread(value: Node) -> Node:
        return _by_output(part, _spread(part, value, val(start).shape, path), rows)

    below, difference = _peel(integers)  # type: ignore[arg-type]
    zeros, inner = None, [*path, start, integers]
    if is_call(difference, aten.sub.Tensor) and isinstance(difference.args[1], Node):
        zeros = spread(_spread(part, part.copy(difference.args[1]), val(difference).shape, below))
        inner += [*below, difference]
    return Factors(
        part,
        spread(part.copy(integers)),  # type: ignore[arg-type]
        spread(part.copy(scales)),
        zeros,
        _by_output(part, part.copy(product.weight), rows),
        [val(start).dtype, *(val(node).dtype for node in reversed(path) if node.target == aten.to.dtype)],
        _narrowest(scales),
        [node for node in inner if isinstance(node, Node) and not static.is_source(node)],
    )


def _factors_of_output(product: Product, static: Static, path: list[Node]) -> Factors:
    """Factors of y = (x @ codes) * scales, one scale for every output; the product then ends with the scaling."""
    following = _next_operand(product.node, aten.mul.Tensor)
    width = val(product.node).shape[-1]
    if following is None or product.bias is not None:
        raise Unfoldable("the weight is integers, and the output is not scaled")
    scaling, index, scales = following
    if scales not in static or val(scales).dim() > 1 or val(scales).numel() not in (1, width):
        raise Unfoldable("the weight is integers, and the output is not scaled by one constant per feature")
    if val(scaling).dtype != val(product.node).dtype:
        raise Unfoldable(f"the scaled output has another dtype, {val(scaling).dtype}")
    part = Subgraph(static)
    codes = _by_output(part, part.copy(product.weight), product.rows)
    column = part.graph.call_function(aten.reshape.default, (part.copy(scales), [-1, 1]))
    shape = list(val(product.weight).shape if product.rows else reversed(val(product.weight).shape))
    spread = part.graph.call_function(aten.expand.default, (column, shape))
    weight = part.graph.call_function(aten.mul.Tensor, (codes, spread))
    product.absorbed.append((scaling, index))
    inner = [node for node in path if not static.is_source(node)]
    dtype = torch.promote_types(val(product.weight).dtype, val(scales).dtype)
    return Factors(part, codes, spread, None, weight, [dtype], _narrowest(scales), inner)


def _next_operand(node: Node, target: Any) -> tuple[Node, int, Any] | None:
    """Return the call that is a value's only use, the value's place in it, and the other operand.

    Reshapes that keep the last dimension may lie in between.
    """
    while len(node.users) == 1:
        (user,) = node.users
        if is_call(user, target) and user.args[0] is not user.args[1] and not user.kwargs:
            index = user.args.index(node)
            return user, index, user.args[1 - index]
        if not (is_call(user, aten.reshape.default) and known_equal(val(user).shape[-1], val(node).shape[-1])):
            return None
        node = user
    return None


def _absorb_bias(product: Product) -> None:
    """Take an addition of one number per output feature into the product."""
    last = product.absorbed[-1][0] if product.absorbed else product.node
    following = _next_operand(last, aten.add.Tensor)
    if product.bias is not None or following is None:
        return
    call, index, bias = following
    if not isinstance(bias, Node) or val(call).dtype != val(product.node).dtype:
        return
    if bias.op == "get_attr" and product.node < bias:
        product.node.prepend(bias)
    if bias < product.node and val(bias).dim() == 1 and known_equal(val(bias).shape[0], val(product.node).shape[-1]):
        product.bias = bias
        product.absorbed.append((call, index))


@dataclass
class Packing:
    """Makes the packed weight from the graph's sources, always in the layout of the first time.

    Attributes:
        compute: function of the sources: the factors integers, scales, weight and maybe zeros, [N, K] each.
        casts, scale_dtype: see `Factors`.
        layout: of the packed weight; chosen by the first call.
        ordered: whether the inputs come in another order.
    """

    compute: Callable[..., tuple[Tensor, ...]]
    casts: list[torch.dtype]
    scale_dtype: torch.dtype
    layout: ops.Layout | None = None
    ordered: bool = False

    def __call__(self, *sources: Tensor) -> tuple[Tensor, ...]:
        """Return the packed weight, and the order of the inputs if they need one.

        Raises:
            Unfoldable: the weight is in no format, or not in the one of the first time.
        """
        integers, scales, weight, *zeros = self.compute(*sources)
        k = integers.shape[1]
        group, least = _group_of([scales, *zeros]), min(LEAST_GROUP, k)
        order = None
        if group < least:
            order = _order_of([scales, *zeros])
            integers, scales, weight, *zeros = (t[:, order] for t in (integers, scales, weight, *zeros))
            group = _group_of([scales, *zeros])
            if group < least:
                raise Unfoldable(f"the scales change within groups of {LEAST_GROUP} inputs, in any order of the inputs")
        if self.layout is not None:
            if (order is not None) != self.ordered:
                raise Unfoldable("the order of the inputs changed")
            size = k if self.layout.group_size == -1 else self.layout.group_size
            group = size if group % size == 0 else group
        layout, parts = self._quantized(_whole(integers), _scales(scales[:, ::group], self.scale_dtype), group)
        if not self._equals(parts, layout, weight):
            raise Unfoldable(f"the weight is not exactly (code - zero) * scale in {layout}")
        self.layout, self.ordered = layout, order is not None
        packed = ops.pack_weight(*parts, str(layout), k)
        return (packed,) if order is None else (packed, order)

    def _equals(self, parts: Canonical, layout: ops.Layout, weight: Tensor) -> bool:
        """Return whether the canonical weight dequantizes to what the model computes."""
        codes, scales, zeros = (None if t is None else t.split(ROWS) for t in parts)
        for i, expected in enumerate(weight.split(ROWS)):
            again = ops.dequantize(codes[i], scales[i], None if zeros is None else zeros[i], layout, weight.shape[1])  # type: ignore[index]
            for dtype in self.casts:
                again = again.to(dtype)
            if not torch.equal(again, expected):
                return False
        return True

    def _quantized(self, integers: Tensor, scales: Tensor, group: int) -> tuple[ops.Layout, Canonical]:
        """Return the smallest layout that holds the weight (or the one of the first time), and the weight in it."""
        size = -1 if group >= integers.shape[1] else group
        for layout in _layouts(size, scales.dtype):
            made = _codes(integers, group, layout) if self.layout in (None, layout) else None
            if made is not None:
                codes, zeros = made
                return layout, (join_codes(codes, layout.format.bits), scales, zeros)
        low, high = (int(v) for v in integers.aminmax())
        wanted = "" if self.layout is None else f" for {self.layout}"
        raise Unfoldable(
            f"codes or groups out of range{wanted}: code - zero is {low} to {high}, groups are {group} wide"
        )


def _group_of(changing: Sequence[Tensor]) -> int:
    """Return the largest group size such that no row of the [N, K] tensors changes within a group."""
    k = changing[0].shape[1]
    changes = torch.zeros(k - 1, dtype=torch.bool)
    for t in changing:
        for rows in t.split(ROWS):
            changes |= (rows[:, 1:] != rows[:, :-1]).any(0)
    starts = (changes.nonzero().flatten() + 1).tolist()
    return math.gcd(*starts) if starts else k


def _order_of(changing: Sequence[Tensor]) -> Tensor:
    """Return an order of the columns [K] that puts equal ones side by side; equal means equal in a 64-bit checksum."""
    sums = torch.zeros(changing[0].shape[1], dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    for t in changing:
        factors = torch.randint(-(1 << 62), 1 << 62, (t.shape[0], 1), generator=generator)
        for total, columns in zip(sums.split(64), t.split(64, 1), strict=True):
            words = columns.double().view(torch.int64)
            total += ((words ^ (words >> 31)) * factors).sum(0)
    return torch.argsort(torch.unique(sums, return_inverse=True)[1], stable=True)


def _whole(values: Tensor) -> Tensor:
    """Return integers of any dtype as int16."""
    if values.is_floating_point() and not torch.equal(values, values.round()):
        raise Unfoldable("the codes are not integers")
    low, high = (int(v) for v in values.aminmax())
    if low < -255 or high > 255:
        raise Unfoldable(f"codes out of range: code - zero is {low} to {high}")
    return values.to(torch.int16)


def _scales(scales: Tensor, narrow: torch.dtype) -> Tensor:
    """Return the scales [N, G] in the dtype that they came from, or in float32 if that does not hold them."""
    if not bool(torch.isfinite(scales).all()):
        raise Unfoldable("a scale is infinite or not a number")
    known = narrow in (torch.float32, torch.bfloat16, torch.float16)
    for dtype in (narrow, torch.float32) if known else (torch.float32,):
        if torch.equal(scales.to(dtype).to(scales.dtype), scales):
            return scales.to(dtype).contiguous()
    raise Unfoldable(f"the scales are {scales.dtype} and do not fit float32")


def _layouts(group: int, scale_dtype: torch.dtype) -> list[ops.Layout]:
    """Return the layouts to try, the smallest first."""
    formats = sorted((row for row in ops.FORMATS.values() if row.integer), key=lambda row: row.bits)
    return [ops.Layout(row.name, asymmetric, group, scale_dtype) for row in formats for asymmetric in (False, True)]


def _codes(differences: Tensor, group: int, layout: ops.Layout) -> tuple[Tensor, Tensor | None] | None:
    """Return (codes uint8 [N, K], zeros uint8 [N, G] or None) with code - zero as given, or None if they do not fit."""
    form, (n, k) = layout.format, differences.shape
    low, high = differences.aminmax()
    if not layout.asymmetric:
        fits = low >= -form.zero and high <= form.levels - form.zero
        return ((differences + form.zero).to(torch.uint8), None) if fits else None
    padded = torch.nn.functional.pad(differences, (0, -k % group)).view(n, -1, group)
    least, most = torch.aminmax(padded, dim=-1)
    zero, top = -least.clamp(max=0), most.clamp(min=0)
    if (zero > form.levels).any() or (zero + top > form.levels).any():
        return None
    codes = (padded + zero.unsqueeze(-1)).view(n, -1)[:, :k]
    return codes.to(torch.uint8), zero.to(torch.uint8)


def _use_elsewhere(factors: Factors, weight: Node) -> str | None:
    """Return which call beside linear layers uses the weight or what it is made of."""
    inside = set(factors.inner)
    for node in factors.inner:
        for user in node.users:
            product = product_of(user) if node is weight else None
            linear = product is not None and product.weight is node and product.x is not node
            if not linear and user not in inside:
                return f"{user.target} uses the weight or its codes as well"
    return None


def _constants(gm: GraphModule, product: Product, static: Static) -> tuple[Packing, list[Node]]:
    """Pack a product's weight; return how, and the nodes of the packed weight and of the order of inputs, if any.

    Raises:
        Unfoldable: it is no quantized weight, or something else needs it.
    """
    if val(product.x).dtype not in COMPUTE:
        raise Unfoldable(f"the activations are {val(product.x).dtype}")
    if product.x in static:
        raise Unfoldable("the activations are constant")
    factors = factors_of(product, static)
    reason = _use_elsewhere(factors, product.weight)
    if reason is not None:
        raise Unfoldable(reason)
    outputs = [factors.integers, factors.scales, factors.weight]
    compute = factors.part.function(*outputs, *([] if factors.zeros is None else [factors.zeros]))
    packing = Packing(compute, factors.casts, factors.scale_dtype)
    fold = Fold(static, factors.part.sources, packing)
    return packing, fold.insert(gm, product.node)


def _substitute(product: Product, layout: ops.Layout, constants: list[Node]) -> None:
    """Put the operator in the place of a product and of what it absorbs."""
    _absorb_bias(product)
    x, packed = product.x, constants[0]
    if len(constants) > 1:
        x = insert_call(product.node, aten.index_select.default, x, -1, constants[1])
    width, compute = val(product.node).shape[-1], COMPUTE[val(x).dtype]
    arguments = (x, packed, product.bias, None, str(layout), width, compute, "none")
    replace(product.node, insert_call(product.node, ops.quant_linear.overload, *arguments))
    for call, index in product.absorbed:
        replace(call, call.args[index])  # type: ignore[arg-type]


def _is_worth_a_word(weight: Node, static: Static) -> bool:
    """Return whether a weight that was not packed looks quantized: a product, or made from integers."""
    _, start = _peel(weight)
    part = Subgraph(static)
    part.copy(start)
    return is_call(start, aten.mul.Tensor) or any(not val(s).is_floating_point() for s in part.sources)


def dequantized_to_quant_linear(gm: GraphModule, report: RewriteReport) -> int:
    """Replace every linear layer with a dequantized weight; return how many."""
    static, count = Static(gm), 0
    shared: dict[tuple[Node, bool], tuple[Packing, list[Node]]] = {}
    for node in list(gm.graph.nodes):
        product = product_of(node)
        if product is None or product.weight not in static or static.is_source(product.weight):
            continue
        key = (product.weight, product.rows)
        try:
            made = shared.get(key) or _constants(gm, product, static)
        except Unfoldable as error:
            if _is_worth_a_word(product.weight, static):
                report.near(NAME, node, Miss(LEAST_GROUP, str(error)), LEAST_GROUP)
            continue
        packing, constants = made
        assert packing.layout is not None
        if not product.absorbed:  # the scale is the weight's own
            shared[key] = made
        _substitute(product, packing.layout, constants)
        count += 1
    if count:
        gm.graph.eliminate_dead_code()
    return count


QUANTIZED = (GraphRewrite(NAME, dequantized_to_quant_linear),)

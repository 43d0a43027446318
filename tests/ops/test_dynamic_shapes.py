"""Every operator in a graph with symbolic sizes: traced at one size, run at others against the reference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

from llmrt import ops
from llmrt.ops import OPERATORS, Layout

Sizes = tuple[int, int, int]  # batch, tokens, cached tokens
TRACED: Sizes = (3, 4, 11)
OTHERS: tuple[Sizes, ...] = ((1, 1, 6), (5, 2, 9), (2, 7, 20), (4, 1, 8))
B, S, T = Dim.DYNAMIC, Dim.DYNAMIC, Dim.DYNAMIC
H, HK, D, K, N = 4, 2, 16, 64, 48
LAYOUT = Layout("int4", False, 32, torch.float32)
torch.manual_seed(0)
WEIGHT, HEAD = torch.randn(K), torch.randn(D)
DENSE, BIAS = torch.randn(2, N, K) / 8, torch.randn(2, N)
CANONICAL = ops.quantize(torch.randn(N, K), LAYOUT)
PACKED = ops.pack_weight.reference(*CANONICAL, str(LAYOUT), K)
GATED = ops.pack_weight.reference(
    *ops.quantize(ops.interleave_gate_up(torch.randn(N, K), torch.randn(N, K)), LAYOUT), str(LAYOUT), K
)

EXPERTS = tuple(
    torch.stack([ops.pack_weight.reference(*ops.quantize(torch.randn(n, k) / 8, LAYOUT), str(LAYOUT), k)] * 4)
    for n, k in ((2 * N, K), (K, N))
)

STATIC = "int8_sym_channel_f32"
CODES = ops.quantize(torch.randn(N, K), Layout.parse(STATIC))
STATIC_ARGS = (ops.pack_weight.reference(*CODES, STATIC, K), ops.weight_sums(CODES[0]))


class Case:
    """A call: `function(operator, *inputs)`; `inputs(sizes)` makes them and `dynamic` has their dynamic dimensions."""

    def __init__(self, name: str, function: Callable[..., Any], inputs: Callable[..., Any], *dynamic: dict[int, Any]):
        self.name, self.function, self.inputs, self.dynamic = name, function, inputs, dynamic


def rows(batch: int, tokens: int, cached: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, tokens, K), torch.randn(batch, tokens, K)


ROWS = ({0: B, 1: S}, {0: B, 1: S})


def chosen(batch: int, tokens: int, cached: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, the numbers of their experts and the experts' weights."""
    scores = torch.rand(batch, tokens, 4)
    return torch.randn(batch, tokens, K), *reversed(scores.topk(2))


CHOSEN = ({0: B, 1: S},) * 3


def heads(batch: int, tokens: int, cached: int) -> tuple[Tensor, ...]:
    """Return query, key, cos and sin."""
    return *torch.randn(batch, tokens, H + HK, D).split((H, HK), 2), *torch.randn(2, batch, tokens, D).unbind(0)


HEADS = ({0: B, 1: S},) * 4


def cached(batch: int, tokens: int, length: int) -> tuple[Tensor, ...]:
    """Return query, key and value."""
    return torch.randn(batch, tokens, H, D), *torch.randn(2, batch, HK, length, D).unbind(0)


CACHED = ({0: B, 1: S}, {0: B, 2: T}, {0: B, 2: T})


def appended(batch: int, tokens: int, capacity: int) -> tuple[Tensor, ...]:
    """Return caches, then new keys and values, then their positions."""
    caches, new = torch.randn(2, batch, HK, capacity, D), torch.randn(2, batch, tokens, HK, D)
    return *caches.unbind(0), *new.unbind(0), torch.randint(0, capacity, (tokens,))


APPENDED = ({0: B, 2: T}, {0: B, 2: T}, {0: B, 1: S}, {0: B, 1: S}, {0: S})


def counted(batch: int, tokens: int, capacity: int) -> tuple[Tensor, ...]:
    """Return what `appended` does, then the number of tokens that the caches hold."""
    return *appended(batch, tokens, capacity), torch.tensor(capacity - tokens)


def padding(batch: int, tokens: int, length: int) -> Tensor:
    return torch.arange(length) >= torch.arange(batch)[:, None] % 3


def buffer_mask(batch: int, tokens: int, length: int) -> Tensor:
    mask = torch.zeros(batch, 1, tokens, length, dtype=torch.bool)
    mask[..., :tokens] = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return mask


CASES = (
    Case("rms_norm", lambda op, x, y: op(x, WEIGHT, 1e-5, 1.0), rows, *ROWS),
    Case("rms_norm", lambda op, x, y: op(x.transpose(0, 1), WEIGHT, 1e-5), rows, *ROWS),
    Case("add_rms_norm", lambda op, x, y: op(x, y, WEIGHT, 1e-5), rows, *ROWS),
    Case("layer_norm", lambda op, x, y: op(x, WEIGHT, None, 1e-5), rows, *ROWS),
    Case("add_layer_norm", lambda op, x, y: op(x, y, WEIGHT, WEIGHT, 1e-5), rows, *ROWS),
    Case("silu_mul", lambda op, x, y: op(x, y), rows, *ROWS),
    Case("gelu_mul", lambda op, x, y: op(x[..., :32], x[..., 32:], "tanh"), rows, *ROWS),
    Case("dense_linear", lambda op, x, y: op(x, torch.eye(K), None, y, "add"), rows, *ROWS),
    Case("parallel_linear", lambda op, x, y: op(x, [torch.eye(K), torch.ones(N, K)], [None, None]), rows, *ROWS),
    Case("gated_linear", lambda op, x, y: op(x, torch.eye(K), torch.eye(K), None, None, "silu"), rows, *ROWS),
    Case("quant_linear", lambda op, x, y: op(x, PACKED, None, None, str(LAYOUT), N, "fp32", "gelu"), rows, *ROWS),
    Case("quant_linear", lambda op, x, y: op(x, PACKED, None, y[..., :N], str(LAYOUT), N, "fp32", "add"), rows, *ROWS),
    Case("quant_linear", lambda op, x, y: op(x, GATED, None, None, str(LAYOUT), N, "fp32", "silu_mul"), rows, *ROWS),
    Case(
        "quant_experts",
        lambda op, x, i, s: op(
            *(t.flatten(0, 1) for t in (x, i, s)), *EXPERTS, None, None, str(LAYOUT), str(LAYOUT), N, "fp32", "fp32"
        ),
        chosen,
        *CHOSEN,
    ),
    Case(
        "static_linear",
        lambda op, x, y: op(x, *STATIC_ARGS, None, y[..., :N], WEIGHT.abs(), 0.05, 120, STATIC, N, "add"),
        rows,
        *ROWS,
    ),
    Case("pack_weight", lambda op, x, y: op(*CANONICAL, str(LAYOUT), K), rows, *ROWS),
    Case("unpack_weight", lambda op, x, y: op(PACKED, str(LAYOUT), N, K), rows, *ROWS),
    Case("argmax", lambda op, x, y: op(x), rows, *ROWS),
    Case("quantize_weight", lambda op, x, y: op(x.flatten(0, 1), str(LAYOUT)), rows, *ROWS),
    Case("dense_linear", lambda op, x, y: op(x, DENSE[0], BIAS[0], None, "gelu_tanh"), rows, *ROWS),
    Case("dense_linear", lambda op, x, y: op(x, DENSE[0], None, y[..., :N], "add"), rows, *ROWS),
    Case("parallel_linear", lambda op, x, y: op(x, [DENSE[0], DENSE[1, :7]], [BIAS[0], BIAS[1, :7]]), rows, *ROWS),
    Case("parallel_linear", lambda op, x, y: op(x, [*DENSE], [None, BIAS[0]]), rows, *ROWS),
    Case("gated_linear", lambda op, x, y: op(x, *DENSE, *BIAS, "silu"), rows, *ROWS),
    Case("rope", lambda op, *x: op(*x), heads, *HEADS),
    Case("rope", lambda op, q, k, c, s: op(q, k, c[:1], s[:1], None, 0, True, HEAD, HEAD), heads, *HEADS),
    Case(
        "rope",
        lambda op, q, k, c, s: op(q, k, c.flatten(0, 1), s.flatten(0, 1), torch.arange(q.shape[1])[None], 0),
        heads,
        *HEADS,
    ),
    Case("kv_append", lambda op, kc, vc, k, v, p: op(kc, vc, k, v, kc.shape[2] - k.shape[1]), appended, *APPENDED),
    Case("kv_append", lambda op, kc, vc, k, v, p: op(kc, vc, k, v, 0, 1, p), appended, *APPENDED),
    Case("kv_append", lambda op, kc, vc, k, v, p, c: op(kc, vc, k, v, 0, counter=c), counted, *APPENDED, {}),
    Case(
        "rope_append",
        lambda op, q, k, c, s, kc, vc, _, v, p, n: op(q, k, v, c, s, kc, vc, 0, counter=n),
        lambda *sizes: (*heads(*sizes), *counted(*sizes)),
        *HEADS,
        *APPENDED,
        {},
    ),
    Case(
        "rope_append",
        lambda op, q, k, c, s, kc, vc, _, v, p: op(q, k, v, c, s, kc, vc, 0, 1, p, None, 0, False, HEAD, HEAD),
        lambda *sizes: (*heads(*sizes), *appended(*sizes)),
        *HEADS,
        *APPENDED,
    ),
    Case("attention", lambda op, q, k, v: op(q, k, v, k.shape[2], 0.3, window=5), cached, *CACHED),
    Case("attention", lambda op, q, k, v: op(q, k, v, q.shape[1] + 1, 0.3, slopes=HEAD[:H]), cached, *CACHED),
    Case(
        "attention",
        lambda op, q, k, v, m: op(q, k, v, k.shape[2], 0.3, mask=m, sinks=HEAD[:H]),
        lambda *sizes: (*cached(*sizes), padding(*sizes)),
        *CACHED,
        {0: B, 1: T},
    ),
    Case(
        "attention",
        lambda op, q, k, v, m: op(q, k, v, k.shape[2], 0.3, False, mask=m),
        lambda *sizes: (*cached(*sizes), buffer_mask(*sizes)),
        *CACHED,
        {0: B, 2: S, 3: T},
    ),
    Case(
        "attention",
        lambda op, q, k, v, r: op(q, k, v, k.shape[2], 0.3, rows=r),
        lambda b, s, t: (*cached(b, s, t), torch.randint(0, b, (b, t), dtype=torch.int32)),
        *CACHED,
        {0: B, 1: T},
    ),
)


class Module(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def forward(self, inputs: tuple[Tensor, ...]) -> Any:
        return self.case.function(OPERATORS[self.case.name].overload, *inputs)


def traced_by_export(case: Case, inputs: tuple[Tensor, ...]) -> tuple[torch.fx.Graph, Callable[..., Any]]:
    program = torch.export.export(Module(case), (inputs,), dynamic_shapes=(case.dynamic,), strict=False)
    return program.graph, program.module()


def traced_by_make_fx(case: Case, inputs: tuple[Tensor, ...]) -> tuple[torch.fx.Graph, Callable[..., Any]]:
    tracer = make_fx(Module(case), tracing_mode="symbolic", pre_dispatch=True, _allow_non_fake_inputs=True)
    module = tracer(inputs)
    return module.graph, module


def outputs(result: Any) -> list[Tensor]:
    return [x for x in (result if isinstance(result, (tuple, list)) else (result,)) if x is not None]


@pytest.mark.parametrize("trace", [traced_by_export, traced_by_make_fx])
@pytest.mark.parametrize("case", [pytest.param(c, id=f"{c.name}-{i}") for i, c in enumerate(CASES)])
def test_one_graph_for_all_sizes(case: Case, trace: Callable[..., Any]) -> None:
    graph, module = trace(case, case.inputs(*TRACED))
    assert [n.target for n in graph.nodes].count(OPERATORS[case.name].overload) == 1
    for sizes in OTHERS:
        inputs = case.inputs(*sizes)
        copies = tuple(x.clone() for x in inputs)
        actual = outputs(module(inputs))
        expected = outputs(case.function(OPERATORS[case.name].reference, *copies))
        assert all(x.is_contiguous() for x in (*actual, *expected)), "the fake kernels say so"
        # Products of two sums of K float32 terms (silu_mul) reach 100, where another order of adding shows at 1e-5.
        torch.testing.assert_close([*actual, *inputs], [*expected, *copies], rtol=2e-5, atol=1e-4)


def test_every_operator_has_a_case() -> None:
    assert {case.name for case in CASES} == set(OPERATORS)


def test_sizes_that_depend_on_data() -> None:
    class Step(nn.Module):
        def forward(self, query: Tensor, key_cache: Tensor, value_cache: Tensor, new: Tensor, at: Tensor) -> Tensor:
            position = at.item()
            torch._check(position >= 0)
            ops.kv_append(key_cache, value_cache, new, new, position)
            return ops.attention(query, key_cache, value_cache, position + new.shape[1], 0.2)

    key_cache, value_cache = torch.zeros(2, 1, HK, 9, D).unbind(0)
    query, new = torch.randn(1, 2, H, D), torch.randn(1, 2, HK, D)
    arguments = (query, key_cache, value_cache, new)
    step = torch.export.export(Step(), (*arguments, torch.tensor(3)), strict=False).module()
    for position in (0, 4):
        actual = step(*arguments, torch.tensor(position))
        torch.testing.assert_close(actual, ops.attention.reference(*arguments[:3], position + 2, 0.2))


def test_sizes_that_cannot_fit_are_refused_while_tracing() -> None:
    case = Case("rope", lambda op, q, k, c, s: op(q, k, c[..., :6], s[..., :6]), heads, *HEADS)
    with pytest.raises(Exception, match="cos has 6 columns; valid: 8 or 16"):
        traced_by_export(case, heads(*TRACED))

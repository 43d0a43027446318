"""Options of the compile backend: what runs the graph, which rewrites, reports, failing rewrites, caching."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import llmrt.passes.backend as backend_module
from llmrt.passes import REWRITES, RewriteError, RewriteReport, llmrt_backend

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Block(nn.Module):
    """A norm and a gated feed-forward part with a residual."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32, dtype=dtype)
        self.gate, self.up = (nn.Linear(32, 48, bias=False, dtype=dtype) for _ in range(2))
        self.down = nn.Linear(48, 32, bias=False, dtype=dtype)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))


def compiled(model: Any, **options: Any) -> tuple[Any, list[RewriteReport]]:
    reports: list[RewriteReport] = []
    options = {"report": reports, **options}
    return torch.compile(model, backend=llmrt_backend, options=options, fullgraph=True), reports


@pytest.mark.parametrize(
    ("mode", "dynamic", "dtype"),
    [  # every two of the three together
        (None, False, torch.float32),
        (None, True, torch.bfloat16),
        ("reduce-overhead", False, torch.bfloat16),
        ("reduce-overhead", True, torch.float32),
    ],
)
def test_inductor_compiles_the_rewritten_graph(mode: str | None, dynamic: bool, dtype: torch.dtype) -> None:
    model, reports = Block(dtype), []
    options = {"codegen": "inductor", "report": reports}
    arguments = {"mode": mode} if mode else {"options": options}
    if mode:
        run = torch.compile(model, backend=lambda gm, i: llmrt_backend(gm, i, mode=mode, options=options))
    else:
        run = torch.compile(model, backend=llmrt_backend, **arguments)
    for tokens in (3, 5) if dynamic else (3,):
        x = torch.randn(2, tokens, 32, dtype=dtype)
        torch.testing.assert_close(run(x), model(x), rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)
    assert reports[0].fired["gated_linear, silu"] == 1


def test_inductors_cache_knows_the_rewritten_graph() -> None:
    from torch._dynamo.utils import counters

    model, x = Block(), torch.randn(2, 4, 32)
    with torch._inductor.utils.fresh_cache():
        for expected in ({"fxgraph_cache_miss": 1}, {"fxgraph_cache_hit": 1}):
            torch._dynamo.reset()
            counters.clear()
            run, reports = compiled(model, codegen="inductor")
            torch.testing.assert_close(run(x), model(x))
            found = {k: v for k, v in counters["inductor"].items() if k in ("fxgraph_cache_miss", "fxgraph_cache_hit")}
            assert found == expected and reports[0].fired["layer_norm"] == 1


def test_chosen_passes_only() -> None:
    model, x = Block(), torch.randn(2, 4, 32)
    run, reports = compiled(model, passes=["layer_norm"])
    torch.testing.assert_close(run(x), model(x))
    assert {k for k, v in reports[0].fired.items() if v} == {"layer_norm"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codegen": "gcc"}, "options['codegen']='gcc'; valid: eager, inductor"),
        ({"passes": ["unroll"]}, "options['passes']=['unroll']: unknown rewrites"),
        ({"passes": "rope"}, "options['passes']='rope'; expected a list"),
        ({"report": "yes"}, "options['report']='yes'; valid: True, False or a list"),
        ({"strict": 1}, "options['strict']=1; valid: True or False"),
        ({"epilogues": True}, "options=['epilogues']: unknown"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_unusable_options_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        llmrt_backend(torch.fx.symbolic_trace(Block()), [], options=options)


def test_the_report_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = compiled(Block(), report=True)
    run(torch.randn(2, 4, 32))
    printed = capsys.readouterr().err
    assert re.search(r"llmrt: \d+ calls before, \d+ after", printed) and "gated_linear, silu: 1" in printed


def test_a_near_miss_is_reported() -> None:
    def nearly(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        v = x.float()
        return weight * (v * torch.rsqrt(v.pow(2).mean(1, keepdim=True) + 1e-6)).to(x.dtype)

    run, reports = compiled(nearly)
    x, weight = torch.randn(2, 4, 32).bfloat16(), torch.ones(32).bfloat16()
    assert torch.equal(run(x, weight), nearly(x, weight))
    assert not reports[0].fired.total()
    assert "rms_norm did not fire (1 times): rsqrt has shape" in str(reports[0])


def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**inputs: Any) -> Any:
        raise ZeroDivisionError("no such operator")

    rewrites = tuple(replace(one, replacement=fail) if one.name == "silu_mul" else one for one in REWRITES)
    monkeypatch.setattr(backend_module, "REWRITES", rewrites)


def test_a_failing_rewrite_is_left_out_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch)
    model, x = Block(), torch.randn(2, 4, 32)
    run, reports = compiled(model)
    with pytest.warns(
        UserWarning, match="rewrite silu_mul failed: ZeroDivisionError: no such operator; it is left out"
    ):
        got = run(x)
    torch.testing.assert_close(got, model(x))
    assert reports[0].skipped == {"silu_mul": "ZeroDivisionError: no such operator"}
    assert reports[0].fired["layer_norm"] == 1 and not reports[0].fired["silu_mul"]


def test_a_failing_rewrite_raises_under_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch)
    run, _ = compiled(Block(), strict=True)
    with pytest.raises(Exception, match="rewrite silu_mul failed") as caught:
        run(torch.randn(2, 4, 32))
    assert isinstance(caught.value.__cause__ or caught.value, RewriteError) or "RewriteError" in str(caught.value)


@torch.library.custom_op("llmrt_tests::reverse", mutates_args=())
def reverse(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1)


@reverse.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_an_operator_that_nobody_knows_runs(codegen: str) -> None:
    model = Block()

    def function(x: torch.Tensor) -> torch.Tensor:
        return model(reverse(model(x))).cumsum(-1)

    run, reports = compiled(function, codegen=codegen)
    x = torch.randn(2, 4, 32)
    torch.testing.assert_close(run(x), function(x), rtol=1e-4, atol=1e-4)
    assert reports[0].fired["gated_linear, silu"] == 2

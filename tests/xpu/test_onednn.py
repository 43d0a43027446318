"""The route through torch's INT4 operator for Intel GPUs, over what the operator is documented to compute."""

import gc
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from comparing import RTOL, compare_with_double
from sample_checks import check_samples
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from llmrt import llm, ops, xpu
from llmrt.ops import Layout
from llmrt.ops.linear import EPILOGUES, _linear_sample
from llmrt.ops.operator import Sample
from llmrt.xpu import onednn
from llmrt.xpu.route import ROUTES, import_routes
from llmrt.xpu.table import candidates, choose

import_routes()
ROUTE = ROUTES["quant_linear", "torch"]
COMPUTES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def documented(x: Tensor, codes: Tensor, group: int, scales: Tensor, zeros: Tensor) -> Tensor:
    """What the operator computes, and what it and oneDNN ask of their arguments."""
    k, n = x.shape[1], codes.shape[0]
    assert x.is_contiguous() and codes.is_contiguous() and scales.is_contiguous() and zeros.is_contiguous()
    assert (codes.dtype, zeros.dtype, scales.dtype) == (torch.int32, torch.int8, x.dtype) and x.dtype in COMPUTES
    assert group > 1 and group % 32 == 0 and k % group == 0
    assert codes.shape == (n, k // 8) and scales.shape == zeros.shape == (k // group, n)
    code = torch.stack([codes >> (4 * i) & 15 for i in range(8)], -1).flatten(1)
    zero, scale = (t.T.repeat_interleave(group, 1) for t in (zeros, scales))
    weight = ((code - zero).float() * scale.float()).to(x.dtype)
    return (x.float() @ weight.float().T).to(x.dtype)


@pytest.fixture
def operator() -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    library.impl("_weight_int4pack_mm_with_scales_and_zeros", documented, "CPU")
    yield
    library._destroy()


def sample(
    dtype: torch.dtype, group: int = 32, asymmetric: bool = False, rows: int = 17, epilogue: str = "none"
) -> Sample:
    layout = Layout("int4", asymmetric, group, dtype)
    return _linear_sample((rows,), 40, 256, layout, dtype, COMPUTES[dtype], epilogue, epilogue != "none")


@pytest.mark.parametrize("dtype", COMPUTES, ids=str)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_groups(
    group: int, asymmetric: bool, dtype: torch.dtype, operator: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "OUTPUTS_AT_A_TIME", 32)
    with xpu.install("cpu", "torch", strict=True) as kernels:
        for rows in (1, 17):
            compare_with_double(ops.quant_linear, sample(dtype, group, asymmetric, rows))
    assert kernels.calls["quant_linear", "torch"] == 2


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_epilogues(epilogue: str, operator: None) -> None:
    """What an epilogue takes is rounded already: of the products of gate and up, both are."""
    with xpu.install("cpu", "torch", strict=True) as kernels:
        for dtype in COMPUTES:
            one = sample(dtype, epilogue=epilogue)
            expected, tolerance = ops.quant_linear.reference(*one.double().args), 4 * RTOL[dtype]
            torch.testing.assert_close(ops.quant_linear(*one.args).double(), expected, rtol=tolerance, atol=tolerance)
    assert kernels.calls["quant_linear", "torch"] == 2


def fits(one: Sample) -> bool:
    """Whether the route says that it serves a sample of the operator."""
    x, layout, compute = one.args[0], Layout.parse(one.args[4]), one.args[6]
    group, inputs = layout.group_size, x.shape[-1]
    whole = inputs % 32 == 0 if group == -1 else group % 32 == 0 and inputs % group == 0
    return (
        layout.weight_dtype == "int4" and layout.scale_dtype == x.dtype and compute == COMPUTES.get(x.dtype) and whole
    )


@pytest.mark.parametrize("dtype", [torch.float32, *COMPUTES], ids=str)
def test_samples_of_the_operator(dtype: torch.dtype, operator: None) -> None:
    samples = ops.quant_linear.sample_inputs(dtype)
    served = [one for one in samples if fits(one)]
    refused = check_samples("quant_linear", "torch", dtype)
    assert refused.total() == len(samples) - len(served) and bool(served) == (dtype in COMPUTES)
    assert all("oneDNN" in reason for reason in refused)


def test_few_rows_and_no_rows(operator: None) -> None:
    x, *others = sample(torch.bfloat16).args
    assert ROUTE.run(x[:0], *others).shape == (0, 40)
    assert ROUTE.run(x[0], *others).shape == (40,)


def test_a_weight_is_reordered_once(operator: None, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    before, unpacked, unpack = onednn.held_bytes(), Counter[str](), ops.unpack_weight
    monkeypatch.setattr(ops, "unpack_weight", lambda *args: unpacked.update(args[1:2]) or unpack(*args))
    x, weight, *others = sample(torch.bfloat16).args
    with xpu.install("cpu", "torch", strict=True), torch.inference_mode():
        first, again = (ops.quant_linear(x, weight, *others) for _ in range(2))
    assert torch.equal(first, again) and unpacked.total() == 1
    size = 40 * 256 // 2 + 40 * 8 * (2 + 1)
    assert onednn.held_bytes() - before == size
    weight.copy_(weight.flip(0))
    changed = ROUTE.run(x, weight, *others)
    assert unpacked.total() == 2 and not torch.equal(changed, first) and onednn.held_bytes() - before == size
    del weight
    gc.collect()
    assert onednn.held_bytes() == before


def kind_of(rows: int, device: str = "xpu", forced: str | None = None) -> str | None:
    args = sample(torch.bfloat16, rows=rows).args
    route, _ = choose(tuple(candidates("quant_linear", xpu.dispatch.DEVICES[device][1], forced)), *args)
    return None if route is None else route.kind


def test_the_table_prefers_it_only_where_it_is_asked_for(operator: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(onednn.ASKED_BY, raising=False)
    usual = kind_of(1), kind_of(17)
    assert "torch" not in usual and None not in usual
    assert kind_of(1, forced="torch") == kind_of(17, forced="torch") == "torch"
    monkeypatch.setenv(onednn.ASKED_BY, "1")
    assert (kind_of(16), kind_of(17)) == (usual[0], "torch")
    monkeypatch.setenv(onednn.ASKED_BY, "0")
    assert kind_of(17) == usual[1]
    monkeypatch.setenv(onednn.ASKED_BY, "yes")
    with pytest.raises(ValueError, match="LLMRT_XPU_ONEDNN is 'yes'; valid: 0, 1"):
        kind_of(17)


def test_without_the_operator_other_kernels_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, for which torch has none."""
    monkeypatch.setenv(onednn.ASKED_BY, "1")
    assert not onednn.available(torch.device("cpu")) and not onednn.available(torch.device("cuda"))
    assert kind_of(17) != "torch" and kind_of(17, "cuda") == "triton"


@pytest.mark.parametrize("epilogue", ["none", "add", "silu_mul"])
def test_fake_tensors_of_an_xpu(epilogue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own meta function of the operator takes the arguments and says the shape."""
    monkeypatch.setattr(onednn, "available", lambda device: device.type == "xpu")
    real = sample(torch.float16, 64, True, epilogue=epilogue)
    with FakeTensorMode():
        there = real.map(lambda t: torch.empty(t.shape, dtype=t.dtype, device="xpu:0"))
        assert ROUTE.refuses(*there.args) is None
        out = ROUTE.run(*there.args)
        words = onednn.reordered(there.args[1], there.args[4], 96 if epilogue == "silu_mul" else 40, 256)
    assert (out.shape, out.dtype, out.device) == ((17, 40), torch.float16, torch.device("xpu:0"))
    assert [t.dtype for t in words] == [torch.int32, torch.float16, torch.int8] and words.codes.shape[1] == 32


def test_views_are_refused(operator: None) -> None:
    x, weight, *others = sample(torch.bfloat16).args
    assert "is a view" in ROUTE.refuses(x, torch.stack([weight, weight])[0], *others)


def test_a_models_prompt_runs_it_and_its_steps_do_not(operator: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strict, by the table: of 20 tokens the linears are oneDNN's but for the head, which is INT8 and of one row."""
    monkeypatch.setenv(onednn.ASKED_BY, "1")
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 96,
    }
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64)).eval().requires_grad_(False)
    config = llm.WeightOnlyQuantConfig(weight_dtype="int4", group_size=32, compute_dtype="bf16")
    model = llm.optimize(plain, dtype=torch.bfloat16, quantization_config=config, strict=True)
    ids = torch.randint(96, (1, 20))

    def logits(cache: llm.KVCache, ids: Tensor) -> Tensor:
        out: Tensor = model(ids, past_key_values=cache, logits_to_keep=1).logits.float()
        return out

    with torch.no_grad():
        cache = llm.KVCache(model.config)
        expected = [logits(cache, ids), logits(cache, ids[:, :1])]
        with xpu.install("cpu", strict=True) as kernels:
            cache = llm.KVCache(model.config)
            prompt = logits(cache, ids)
            assert kernels.calls["quant_linear", "torch"] == 4 * 2
            step = logits(cache, ids[:, :1])
        assert kernels.calls["quant_linear", "torch"] == 4 * 2
    for actual, wanted in zip((prompt, step), expected, strict=True):
        assert (actual - wanted).norm() < 0.02 * wanted.norm()

"""A whole model under the SYCL kernels, and under Triton's, gives the tokens that the CPU's kernels give."""

import copy
import sys
from pathlib import Path

import pytest
import torch

from llmrt import llm, xpu
from llmrt.xpu.sycl.toolchain import missing

sys.path.insert(0, str(Path(__file__).parent.parent / "llm"))

from expert_models import expert_model
from models import padded_batch, tiny_model

#: Calls of a forward of two layers: 2 x (query/key/value, output, gate/up, down) and the head are linears.
CALLS = {"rms_norm": 1, "add_rms_norm": 4, "rope_append": 2, "attention": 2, "quant_linear": 9}


SYCL = pytest.param("sycl", marks=pytest.mark.skipif(missing() is not None, reason=str(missing())))


@pytest.mark.parametrize("kind", [SYCL, "triton"])
@pytest.mark.parametrize(("options", "tokens"), [({}, 8), ({"num_beams": 2}, 4)], ids=["greedy", "beams"])
def test_int4_model_gives_the_cpus_tokens(options: dict[str, int], tokens: int, kind: str) -> None:
    """Strict: an operator without a kernel would raise. Two left-padded prompts; beams read the cache through rows."""
    with torch.no_grad():
        fast = llm.optimize(tiny_model("llama"), quantization_config=llm.WeightOnlyQuantConfig(weight_dtype="int4"))
        generate = {**padded_batch(2, 9), "max_new_tokens": tokens, "do_sample": False, **options}
        expected = fast.generate(**generate)
        graphs = fast.forward.graphs
        with xpu.install("cpu", kind, strict=True) as kernels:
            actual = fast.generate(**generate)
    assert graphs and fast.forward.graphs == graphs
    assert torch.equal(actual, expected) and expected.shape == (2, 9 + tokens)
    calls = {(name, kind): tokens * count for name, count in CALLS.items()}
    assert kernels.calls == calls | ({} if options else {("argmax", kind): tokens})


@pytest.mark.parametrize("kind", [SYCL, "triton"])
def test_experts_give_the_cpus_tokens(kind: str) -> None:
    """The prompt's tokens are put in the order of their experts, the new ones run alone; SYCL has linears of experts only."""
    config = llm.WeightOnlyQuantConfig(weight_dtype="int4", group_size=32)
    with torch.no_grad():
        fast = llm.optimize(expert_model("qwen2_moe"), quantization_config=config)
        generate = {**padded_batch(1, 9), "max_new_tokens": 4, "do_sample": False}
        expected = fast.generate(**generate)
        with xpu.install("cpu", kind, strict=True) as kernels:
            actual = fast.generate(**generate)
    assert torch.equal(actual, expected)
    assert kernels.calls["quant_experts", "triton" if kind == "triton" else "torch"] == 2 * 4
    assert {called for _, called in kernels.calls} <= {kind, "torch"}


@pytest.mark.parametrize("kind", [SYCL, "triton"])
def test_static_int8_gives_the_cpus_tokens(kind: str, tmp_path: Path) -> None:
    config, summary = llm.StaticQuantConfig(), tmp_path / "q.json"
    with torch.no_grad():
        prepared = llm.optimize(tiny_model("llama"), quantization_config=config)
        prepared(**padded_batch())
        llm.save_qconf_summary(prepared, summary)
        fast = llm.optimize(tiny_model("llama"), quantization_config=config, qconfig_summary_file=summary)
        generate = {**padded_batch(1, 5), "max_new_tokens": 2, "do_sample": False}
        expected = fast.generate(**generate)
        with xpu.install("cpu", kind, strict=True) as kernels:
            actual = fast.generate(**generate)
    assert torch.equal(actual, expected)
    assert kernels.calls["static_linear", "triton" if kind == "triton" else "torch"] == 9 * 2


@pytest.mark.parametrize("kind", [SYCL, "triton"])
def test_a_model_is_captured_over_the_kernels(kind: str) -> None:
    """As on a GPU, where nothing ran on the CPU's kernels before: modules and graph agree in the trial run, and the graph then runs."""
    fast = llm.optimize(
        tiny_model("llama"), quantization_config=llm.WeightOnlyQuantConfig(weight_dtype="int4"), strict=True
    )
    batch, other = padded_batch(2, 5), copy.deepcopy(fast)
    with torch.no_grad():
        expected = other.generate(**batch, max_new_tokens=3, do_sample=False)
        with xpu.install("cpu", kind, strict=True) as kernels:
            actual = fast.generate(**batch, max_new_tokens=3, do_sample=False)
            calls = kernels.calls.copy()
            again = fast.generate(**batch, max_new_tokens=3, do_sample=False)
    assert torch.equal(actual, expected) and torch.equal(again, expected)
    assert len(fast.forward.graphs) == 2  # the prompt, a step
    assert kernels.calls - calls == {(name, kind): 3 * count for name, count in (CALLS | {"argmax": 1}).items()}

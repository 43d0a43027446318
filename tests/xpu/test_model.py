"""A whole model under the SYCL kernels, and under Triton's, gives the tokens that the CPU's kernels give."""

import sys
from pathlib import Path

import pytest
import torch

from llmrt import llm, xpu
from llmrt.xpu.sycl.toolchain import missing

sys.path.insert(0, str(Path(__file__).parent.parent / "llm"))

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
        with xpu.install("cpu", kind, strict=True) as kernels:
            actual = fast.generate(**generate)
    assert torch.equal(actual, expected) and expected.shape == (2, 9 + tokens)
    calls = {(name, kind): tokens * count for name, count in CALLS.items()}
    assert kernels.calls == calls | ({} if options else {("argmax", kind): tokens})

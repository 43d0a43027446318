"""A whole model under Triton's kernels gives the tokens that the CPU's kernels give."""

import sys
from pathlib import Path

import pytest
import torch

from llmrt import llm, xpu

sys.path.insert(0, str(Path(__file__).parent.parent / "llm"))

from models import padded_batch, tiny_model

#: Calls of a forward of two layers: 2 x (query/key/value, output, gate/up, down) and the head are linears.
CALLS = {"rms_norm": 1, "add_rms_norm": 4, "rope_append": 2, "attention": 2, "quant_linear": 9}


@pytest.mark.parametrize(("options", "tokens"), [({}, 8), ({"num_beams": 2}, 4)], ids=["greedy", "beams"])
def test_int4_model_gives_the_cpus_tokens(options: dict[str, int], tokens: int) -> None:
    """Strict: an operator without a kernel would raise. Two left-padded prompts; beams read the cache through rows."""
    with torch.no_grad():
        fast = llm.optimize(tiny_model("llama"), quantization_config=llm.WeightOnlyQuantConfig(weight_dtype="int4"))
        generate = {**padded_batch(2, 9), "max_new_tokens": tokens, "do_sample": False, **options}
        expected = fast.generate(**generate)
        with xpu.install("cpu", "triton", strict=True) as kernels:
            actual = fast.generate(**generate)
    assert torch.equal(actual, expected) and expected.shape == (2, 9 + tokens)
    calls = {(name, "triton"): tokens * count for name, count in CALLS.items()}
    assert kernels.calls == calls | ({} if options else {("argmax", "triton"): tokens})

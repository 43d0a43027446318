"""XPU tensors without an XPU: schemas, fake kernels and passes on fake tensors of that device."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear, silu

from llmrt.ops import OPERATORS
from llmrt.ops.operator import Sample
from llmrt.passes import rewrite
from llmrt.passes.order import REWRITES
from llmrt.passes.retrace import retrace

XPU = torch.device("xpu:0")


def on_xpu(sample: Sample) -> Sample:
    """Return the sample with fake XPU tensors of the same sizes, strides and dtypes."""
    return sample.map(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=XPU))


def tensors(out: object) -> list[Tensor]:
    return [t for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor)]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_say_shapes_on_the_device(name: str) -> None:
    op = OPERATORS[name]
    for sample in op.sample_inputs(
        torch.bfloat16 if name != "pack_weight" and name != "unpack_weight" else torch.float32
    ):
        expected = tensors(op.reference(*sample.clone().args, **sample.clone().kwargs))
        with FakeTensorMode():
            there = on_xpu(sample)
            actual = tensors(op(*there.args, **there.kwargs))
        assert len(actual) == len(expected), sample.name
        for a, e in zip(actual, expected, strict=True):
            assert (a.shape, a.dtype, a.device) == (e.shape, e.dtype, XPU), sample.name


class Block(torch.nn.Module):
    """A norm after a residual sum, a gated feed-forward part, written as models write them."""

    def forward(self, x: Tensor, residual: Tensor, scale: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        total = x + residual
        v = total.float()
        normed = scale * (v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)
        return total + linear(silu(linear(normed, gate)) * linear(normed, up), down)


@pytest.mark.parametrize("device", ["cpu", "xpu"])
def test_passes_fire_on_the_device(device: str) -> None:
    """The same operators replace the same parts on every device."""
    with FakeTensorMode():
        shapes = ((2, 3, 64), (2, 3, 64), (64,), (96, 64), (96, 64), (64, 96))
        inputs = [torch.empty(shape, dtype=torch.bfloat16, device=device) for shape in shapes]
        graph = retrace(torch.fx.symbolic_trace(Block()), inputs)
        rewrite(graph, REWRITES, True)
        called = [node.target.name() for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        assert "llmrt::add_rms_norm" in called and "llmrt::gated_linear" in called and "llmrt::dense_linear" in called
        assert not [name for name in called if name.startswith("aten")]
        (output,) = (node.args[0] for node in graph.graph.find_nodes(op="output"))
        value = (output[0] if isinstance(output, tuple | list) else output).meta["val"]
        assert value.device.type == device and value.shape == (2, 3, 64)

"""Lets a capture take the tensors that a model holds for tensors of a GPU that is not there."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llmrt.llm import captured_forward
from llmrt.passes.capture import Capture, Captured

aten = torch.ops.aten


class Indexing(TorchFunctionMode):
    """Indexes by operators: torch's Python indexing asks for the device's runtime, which a build without it lacks."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.__getitem__ or args[0].device.type == "cpu":
            return func(*args, **(kwargs or {}))
        x, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
        if Ellipsis in index:
            at, used = index.index(Ellipsis), sum(i is not None for i in index) - 1
            index = (*index[:at], *[slice(None)] * (x.dim() - used), *index[at + 1 :])
        dim = 0
        for one in index:
            if isinstance(one, int):
                x = aten.select(x, dim, one)
                continue
            if one is None:
                x = aten.unsqueeze(x, dim)
            elif one != slice(None):
                assert isinstance(one, slice) and one.step in (None, 1)
                x = aten.slice(x, dim, one.start, one.stop)
            dim += 1
        return x


def pretend(monkeypatch: pytest.MonkeyPatch, model: Any, device: torch.device) -> None:
    """Let captures see the parameters and buffers of a model on a device; every other tensor is where it is made."""
    held = {id(t) for t in (*model.parameters(), *model.buffers())}

    class Elsewhere(Capture):
        def __init__(self) -> None:
            super().__init__()
            converter = self.mode.fake_tensor_converter
            convert = converter.from_real_tensor

            def moved(mode: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
                fake = convert(mode, tensor, *args, **kwargs)
                if id(tensor) in held:
                    fake.fake_device = device
                return fake

            converter.from_real_tensor = moved  # type: ignore[method-assign]

        def trace(self, *args: Any) -> Captured:
            captured = super().trace(*args)
            for node in captured.module.graph.find_nodes(op="get_attr"):
                if id(getattr(captured.module, node.target)) in held:  # type: ignore[arg-type]
                    node.meta["val"].fake_device = device
            return captured

    weight = SimpleNamespace(weight=SimpleNamespace(device=device), num_embeddings=model.config.vocab_size)
    monkeypatch.setattr(captured_forward, "Capture", Elsewhere)
    monkeypatch.setattr(model, "get_input_embeddings", lambda: weight)

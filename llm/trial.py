"""Trial runs of a model that has no row: which linears are read directly, and whether attention and cache fit it.

A few random tokens go through a copy of the model's structure that shares its weights (llm/convert.share_copy), so the model is
neither changed nor copied.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import attention
from .cache import KVCache
from .sharing import share_copy


class _Recorder(nn.Module):
    """A linear that notes when its weight or bias is read from outside."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.__dict__["tensors"] = (linear.weight, linear.bias)
        self.read = False

    @property
    def weight(self) -> Tensor:
        self.read = True
        return self.__dict__["tensors"][0]

    @property
    def bias(self) -> Tensor | None:
        self.read = True
        return self.__dict__["tensors"][1]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.__dict__["tensors"])


def _tokens(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids and mask [2, 8], the first row left-padded by 3, and their positions."""
    size = model.get_input_embeddings().num_embeddings
    ids = torch.randint(size, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def _logits(model: Any, ids: Tensor, mask: Tensor, positions: Tensor, **options: Any) -> Tensor:
    if "position_ids" in inspect.signature(model.forward).parameters:
        options["position_ids"] = positions
    return model(input_ids=ids, attention_mask=mask, **options).logits.float()


@torch.no_grad()
def directly_read(model: Any) -> set[str] | str:
    """Return the names of linears whose weight the model reads without calling them, or why it cannot run."""
    copy = share_copy(model)
    recorders = {}
    for name, module in list(copy.named_modules()):
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            recorders[name] = _Recorder(module)
            copy.set_submodule(name, recorders[name])
    ids, mask, _ = _tokens(model)
    try:
        copy(input_ids=ids, attention_mask=mask, use_cache=False)
    except Exception as error:  # a foreign forward may raise anything
        return f"a trial run failed ({_short(error)})"
    return {name for name, recorder in recorders.items() if recorder.read}


@torch.no_grad()
def attention_misfit(model: Any) -> str | None:
    """Return why llmrt's attention and cache do not fit a model, or None.

    With them the model reads five tokens, its rows change places as in a beam search, and it reads one token more, then two; this must
    agree with the model's own attention over the whole sequence.
    """
    copy = share_copy(model)
    copy.set_attn_implementation(attention.NAME)
    ids, mask, positions = _tokens(model)
    swap = torch.tensor([1, 0])
    try:
        expected = _logits(model, ids[swap], mask[swap], positions[swap], use_cache=False)
        cache, outs = KVCache(copy.config), []
        for start, end in ((0, 5), (5, 6), (6, 8)):
            if start == 5:
                cache.reorder_cache(swap)
            rows = swap if start else torch.arange(2)
            part = ids[rows, start:end], mask[rows, :end], positions[rows, start:end]
            outs.append(_logits(copy, *part, past_key_values=cache, use_cache=True))
        outs[0] = outs[0][swap]
    except Exception as error:  # a foreign forward may raise anything
        return f"a trial run failed ({_short(error)})"
    got, real = torch.cat(outs, 1), mask[swap].bool()
    if not all(layer.claimed for layer in cache.layers):
        return "not all of its layers use the attention interface with the cache"
    exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    difference = (got - expected)[real].square().mean().sqrt() / expected[real].square().mean().sqrt()
    if not bool(difference < (1e-3 if exact else 0.05)):
        return f"in a trial run its logits differ by {float(difference):.1e}"
    return None


def _short(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}"

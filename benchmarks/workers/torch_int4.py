"""torch's own INT4 weight-only linear for the CPU, `torch._weight_int4pack_mm_for_cpu`, as a module with random weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TorchInt4Linear(nn.Module):
    """y = x W^T + b with W in the packed form of `torch.ops.aten._convert_weight_to_int4pack_for_cpu`.

    The codes are random bytes: whatever their order, they are some weight. Value = (code - 8) * scale + zero.
    """

    def __init__(self, linear: nn.Linear, group_size: int) -> None:
        """Draw the weight of a linear that may be on the meta device."""
        super().__init__()
        n, k = linear.out_features, linear.in_features
        if n % 16 or k % group_size:
            raise ValueError(
                f"the linear is {n} x {k}; torch needs outputs in 16s and inputs in groups of {group_size}"
            )
        scales = torch.zeros((k // group_size, n, 2), dtype=torch.bfloat16)
        scales[..., 0] = 1 / (4.6 * k**0.5)  # 4.6: standard deviation of uniform codes 0..15
        self.group_size = group_size
        self.register_buffer("weight", torch.randint(256, (n, k // 2), dtype=torch.uint8))
        self.register_buffer("scales_and_zeros", scales)
        self.bias = linear.bias
        self.out_features = n

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., K] -> [..., N]."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y = torch._weight_int4pack_mm_for_cpu(rows, self.weight, self.group_size, self.scales_and_zeros)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)


def replace_linears(model: nn.Module, group_size: int) -> None:
    """Replace every linear of a model, the head included."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, TorchInt4Linear(child, group_size))

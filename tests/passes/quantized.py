"""Linear layers whose forward unpacks and dequantizes their weight, in the ways that checkpoints' modules do it."""

import torch
from torch import Tensor, nn

AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


def pack(codes: Tensor, bits: int) -> Tensor:
    """[R, C] codes -> int32 [R, C * bits / 32], the first in the lowest bits."""
    parts = codes.long().view(codes.shape[0], -1, 32 // bits)
    words = (parts << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


class Quantized(nn.Module):
    """Random codes [K, N], zeros [G, N] and scales; `weight` is what they stand for, float64 [K, N]."""

    def __init__(self, k: int, n: int, group: int, dtype: torch.dtype, bits: int = 4, symmetric: bool = False) -> None:
        super().__init__()
        self.bits, self.group, self.k, self.n = bits, group, k, n
        groups = k // group
        self.codes = torch.randint(0, 1 << bits, (k, n))
        self.zeros = torch.full((groups, n), 1 << bits - 1) if symmetric else torch.randint(1, 1 << bits, (groups, n))
        self.register_buffer("scales", (torch.rand(groups, n) * 0.02 + 0.01).to(dtype))
        self.register_buffer("g_idx", torch.arange(k) // group)
        self.bias = nn.Parameter(torch.randn(n).to(dtype), requires_grad=False)

    def weight(self) -> Tensor:
        rows = self.g_idx.long()
        return (self.codes - self.zeros[rows]).double() * self.scales.double()[rows]


class Gptq(Quantized):
    """Codes packed along K; version 1 stores zeros minus one; act_order shuffles the groups."""

    def __init__(self, *args: object, version: int = 2, grouped: bool = False, act_order: bool = False, **kw: object):
        super().__init__(*args, **kw)  # type: ignore[arg-type]
        self.version, self.grouped = version, grouped
        if act_order:
            self.g_idx.copy_(self.g_idx[torch.randperm(self.k)])
        self.register_buffer("qweight", pack(self.codes.T.contiguous(), self.bits).T.contiguous())
        self.register_buffer("qzeros", pack(self.zeros - (2 - version), self.bits))
        self.wf = torch.arange(0, 32, self.bits, dtype=torch.int32).unsqueeze(0)

    def forward(self, x: Tensor) -> Tensor:
        most, narrow = (1 << self.bits) - 1, torch.int8 if self.bits == 4 else torch.int16
        zeros = torch.bitwise_right_shift(
            self.qzeros.unsqueeze(2).expand(-1, -1, 32 // self.bits), self.wf.unsqueeze(0)
        ).to(narrow)
        zeros = torch.bitwise_and(zeros, most)
        if self.version == 1:
            zeros = zeros + 1
        zeros = zeros.reshape(self.scales.shape)
        codes = torch.bitwise_right_shift(
            self.qweight.unsqueeze(1).expand(-1, 32 // self.bits, -1), self.wf.unsqueeze(-1)
        ).to(narrow)
        codes = torch.bitwise_and(codes, most)
        if self.grouped:
            codes = codes.reshape(-1, self.group, codes.shape[2])
            weight = self.scales.reshape(-1, 1, self.n) * (codes - zeros.reshape(-1, 1, self.n))
            weight = weight.reshape(self.k, self.n)
        else:
            codes, rows = codes.reshape(-1, codes.shape[2]), self.g_idx.long()
            weight = self.scales[rows] * (codes - zeros[rows])
        out = torch.matmul(x.reshape(-1, self.k), weight.to(x.dtype)).reshape(*x.shape[:-1], self.n)
        return out + self.bias


class Awq(Quantized):
    """Codes packed along N, in the order 0, 2, 4, 6, 1, 3, 5, 7."""

    def __init__(self, *args: object, **kw: object) -> None:
        super().__init__(*args, **kw)  # type: ignore[arg-type]
        inverse = [AWQ_ORDER.index(i) for i in range(8)]
        self.register_buffer("qweight", pack(self.codes.view(self.k, -1, 8)[..., inverse].flatten(1), 4))
        self.register_buffer("qzeros", pack(self.zeros.view(len(self.zeros), -1, 8)[..., inverse].flatten(1), 4))

    def forward(self, x: Tensor) -> Tensor:
        shifts = torch.arange(0, 32, 4)
        codes = (
            torch.bitwise_right_shift(self.qweight[:, :, None], shifts[None, None, :]).to(torch.int8).view(self.k, -1)
        )
        zeros = torch.bitwise_right_shift(self.qzeros[:, :, None], shifts[None, None, :]).to(torch.int8)
        zeros = zeros.view(self.qzeros.shape[0], -1)
        order = torch.arange(self.n).view(-1, 8)[:, AWQ_ORDER].view(-1)
        codes, zeros = torch.bitwise_and(codes[:, order], 15), torch.bitwise_and(zeros[:, order], 15)
        scales, zeros = (t.repeat_interleave(self.group, dim=0) for t in (self.scales, zeros))
        return torch.matmul(x, (codes - zeros) * scales) + self.bias


class Int8(nn.Module):
    """int8 weight [N, K] with a scale per row, applied to the weight or to the output."""

    def __init__(self, k: int, n: int, dtype: torch.dtype, after: bool = False) -> None:
        super().__init__()
        self.after = after
        self.register_buffer("codes", torch.randint(-128, 128, (n, k), dtype=torch.int8))
        self.register_buffer("scales", (torch.rand(n) * 0.002 + 0.001).to(dtype))
        self.bias = nn.Parameter(torch.randn(n).to(dtype), requires_grad=False)

    def weight(self) -> Tensor:
        return (self.codes.double() * self.scales.double().unsqueeze(1)).T

    def forward(self, x: Tensor) -> Tensor:
        if self.after:
            return torch.nn.functional.linear(x, self.codes.to(x.dtype)) * self.scales + self.bias
        return torch.nn.functional.linear(x, self.codes.to(x.dtype) * self.scales.unsqueeze(1), self.bias)

"""Models with random weights for benchmarks: built on the meta device, quantized weights are drawn as codes, never as floats."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..ops.formats import Layout
from .checkpoints.stored import store_experts
from .expert_plan import routers
from .experts import is_experts
from .linear import Canonical, CanonicalLinear
from .quantization import WeightOnlyQuantConfig

#: Rows that are drawn for a weight; the others repeat them.
DRAWN_ROWS = 256


def bare_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model whose linears and experts are on the meta device (biases zero, on the CPU) and whose other parts are initialized.

    A head tied to the embedding table shares its real weight.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    rest = [module for module in model.modules() if not isinstance(module, nn.Linear) and not is_experts(module)]
    for module in rest:
        module.to_empty(device="cpu", recurse=False)
    for module in reversed(rest):
        model._init_weights(module)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias = nn.Parameter(torch.zeros_like(module.bias, device="cpu"), requires_grad=False)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def fill_linears(model: nn.Module) -> None:
    """Give every linear, and experts, still on the meta device float weights with standard deviation 1 / sqrt(K)."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(1 << 20, generator=generator)
    for module in model.modules():
        if not isinstance(module, nn.Linear) and not is_experts(module):
            continue
        for name, old in list(module.named_parameters(recurse=False)):
            if old.is_meta:
                weight = torch.empty_like(old, device="cpu")
                _repeat((drawn / old.shape[-1] ** 0.5).to(weight.dtype), weight.view(-1))
                setattr(module, name, nn.Parameter(weight, requires_grad=False))


def _repeat(drawn: Tensor, out: Tensor) -> None:
    """Fill `out` with repetitions of `drawn` along the first dimension."""
    done = min(len(drawn), len(out))
    out[:done] = drawn[:done]
    while done < len(out):
        more = min(done, len(out) - done)
        out[done : done + more] = out[:more]
        done += more


class RandomLinear(CanonicalLinear):
    """A linear that draws its quantized weight when `optimize` asks for it and holds nothing before.

    Codes are uniform (of finite values), scales such that the weight's standard deviation is 1 / sqrt(K).
    """

    def __init__(self, linear: nn.Linear, layout: Layout, seed: int) -> None:
        """Take sizes and bias of a linear that may be on the meta device."""
        super().__init__(linear.in_features, linear.out_features, False, layout, linear.weight.dtype, device="meta")
        for name, tensor in list(self.named_buffers()):  # one element, seen in the right shape
            self.register_buffer(name, torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape))
        self.bias = linear.bias
        self.seed = seed
        self.train(linear.training)

    def canonical(self) -> Canonical:
        """Draw the weight; every call gives the same one."""
        bits, groups = self.layout.format.bits, self.layout.geometry(self.in_features).groups
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randint(
            256,
            (min(DRAWN_ROWS, self.out_features), -(-self.in_features * bits // 8)),
            generator=generator,
            dtype=torch.uint8,
        )
        row = self.layout.format
        if row.dtype is not None:
            drawn[~drawn.view(row.dtype).float().isfinite()] = 0  # NaN and infinity are no weights
        if bits == 4 and self.in_features % 2:
            drawn[:, -1] &= 15  # the nibble behind the last input is 0
        codes = torch.empty((self.out_features, drawn.shape[1]), dtype=torch.uint8)
        _repeat(drawn, codes)
        deviation = ((1 << bits) ** 2 / 12) ** 0.5
        if not row.integer:
            values = drawn.view(row.dtype).float() if row.dtype is not None else row.values()
            deviation = float(values.std(correction=0))
        shape = (self.out_features, groups)
        scales = torch.full(shape, 1 / (deviation * self.in_features**0.5), dtype=self.layout.scale_dtype)
        zeros = torch.full(shape, row.zero, dtype=torch.uint8) if self.layout.asymmetric else None
        return Canonical(codes, scales, zeros)


def quantized_linears(model: PreTrainedModel, config: WeightOnlyQuantConfig) -> None:
    """Replace every linear that `config` quantizes by a `RandomLinear`, so that `optimize` packs it without a float copy."""
    store_experts(model, [n for n, m in model.named_modules() if is_experts(m) and not config.excluded_by(n)])
    beside = routers(dict(model.named_modules()))
    head = model.get_output_embeddings()
    for index, (name, module) in enumerate(list(model.named_modules())):
        layout = config.head_layout() if module is head else config.layout()
        if isinstance(module, nn.Linear) and layout and not config.excluded_by(name) and name not in beside:
            model.set_submodule(name, RandomLinear(module, layout, index))

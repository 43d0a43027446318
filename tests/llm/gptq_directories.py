"""Directories of GPTQ checkpoints with 4 bits, written from the format's description, and the smallest reader of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llmrt.llm.checkpoints.reader import Entry, Weight
from llmrt.llm.linear import Canonical
from llmrt.ops.formats import Layout, join_codes

GROUP = 16


def fields(values: Tensor, along: int) -> Tensor:
    """Return 4-bit values, 8 to an int32, the first in the lowest bits, packed along a dimension."""
    values = values.movedim(along, -1).long().unflatten(-1, (-1, 8))
    word = (values << (4 * torch.arange(8))).sum(-1)
    return torch.where(word >= 2**31, word - 2**32, word).int().movedim(-1, along).contiguous()


def pack_linear(in_features: int, out_features: int, act_order: bool, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors of a linear with random codes, and its float weight [N, K] in float32."""
    draw = torch.Generator().manual_seed(seed)
    groups = in_features // GROUP
    codes = torch.randint(16, (in_features, out_features), generator=draw)
    zeros = torch.randint(1, 17, (groups, out_features), generator=draw)  # stored minus 1; 16 is legal
    zeros[0] = 1 + torch.arange(out_features) % 16
    scales = ((torch.rand(groups, out_features, generator=draw) + 0.5) * 0.2 / in_features**0.5).half()
    group_of = torch.arange(in_features) // GROUP
    if act_order:
        group_of = group_of[torch.randperm(in_features, generator=draw)]
    weight = (codes - zeros[group_of]) * scales.float()[group_of]
    tensors = {"qweight": fields(codes, 0), "qzeros": fields(zeros - 1, 1), "scales": scales, "g_idx": group_of.int()}
    return tensors, weight.T.contiguous()


def save_gptq(model: Any, directory: Path, act_order: bool = False, skip: tuple[str, ...] = ("lm_head",)) -> Any:
    """Write `model` as a GPTQ checkpoint with random quantized weights; put their values into it and return it.

    Linears with a name that ends with one of `skip` stay floating point. Siblings share a permutation, as GPTQ gives them one.
    """
    tensors: dict[str, Tensor] = {k: v.clone() for k, v in model.state_dict().items()}
    for index, (name, module) in enumerate(model.named_modules()):
        if not isinstance(module, nn.Linear) or name.endswith(skip):
            continue
        parts, weight = pack_linear(module.in_features, module.out_features, False, index)
        if act_order:
            seed = sum(map(ord, name.rpartition(".")[0])) + module.in_features
            order = torch.randperm(module.in_features, generator=torch.Generator().manual_seed(seed))
            parts["g_idx"] = parts["g_idx"][order].contiguous()
            scales, groups = parts["scales"].float(), module.in_features // GROUP
            zeros = ((parts["qzeros"].unsqueeze(-1) >> (4 * torch.arange(8))) & 15).view(groups, -1) + 1
            codes = ((parts["qweight"].unsqueeze(1) >> (4 * torch.arange(8)).view(8, 1)) & 15).flatten(0, 1)
            group_of = parts["g_idx"].long()
            weight = ((codes - zeros[group_of]) * scales[group_of]).T
        del tensors[f"{name}.weight"]
        tensors.update({f"{name}.{key}": value for key, value in parts.items()})
        module.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    directory.mkdir(exist_ok=True)
    model.config.save_pretrained(directory)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    edit_json(directory / "config.json", lambda c: c.update(quantization_config=QUANTIZATION, dtype="float32"))
    return model


QUANTIZATION = {"quant_method": "tiny-gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}


def edit_json(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


class TinyReader:
    """Reads what `save_gptq` wrote."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        if config.get("bits") != 4:
            raise ValueError(f"bits is {config.get('bits')!r}; valid: 4")

    def quantizes(self, name: str, found: Mapping[str, Entry]) -> bool:
        return "qweight" in found

    def check(self, name: str, in_features: int, out_features: int, found: Mapping[str, Entry]) -> None:
        groups = in_features // GROUP
        wanted = {
            "qweight": Entry((in_features // 8, out_features), torch.int32),
            "qzeros": Entry((groups, out_features // 8), torch.int32),
            "scales": Entry((groups, out_features), torch.float16),
            "g_idx": Entry((in_features,), torch.int32),
        }
        for key, entry in wanted.items():
            if found.get(key) != entry:
                raise ValueError(f"{name}.{key} is {found.get(key)}; expected {entry}")

    def read(self, name: str, in_features: int, out_features: int, tensors: Mapping[str, Tensor]) -> Weight:
        codes = torch.stack([(tensors["qweight"] >> (4 * i)) & 15 for i in range(8)], 1).flatten(0, 1)
        zeros = torch.stack([(tensors["qzeros"] >> (4 * i)) & 15 for i in range(8)], 2).flatten(1) + 1
        group_of, perm = tensors["g_idx"].long(), None
        if int(group_of.min()) < 0 or int(group_of.max()) >= in_features // GROUP:
            raise ValueError(f"{name}.g_idx is out of range")
        if not torch.equal(group_of, torch.arange(in_features) // GROUP):
            perm = group_of.argsort(stable=True)
            codes = codes[perm]
        layout = Layout("int8" if int(zeros.max()) > 15 else "int4", True, GROUP, torch.float16)
        part = Canonical(
            join_codes(codes.T.to(torch.uint8).contiguous(), layout.format.bits),
            tensors["scales"].T.contiguous(),
            zeros.T.to(torch.uint8).contiguous(),
        )
        return Weight(layout, part, None if perm is None else perm.int())


TINY_READERS = ((lambda config: config.get("quant_method") == "tiny-gptq", TinyReader),)

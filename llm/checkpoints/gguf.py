"""GGUF files: weights in ggml's blocks, the configuration in the file's metadata.

The file's header is checked by gguf_header.py before anything else reads it. transformers turns metadata into a configuration and
names of tensors into names of parameters, and undoes what the conversion to GGUF did to them (rows of query and key in another
order). Blocks that have a counterpart here (ggml_blocks.py) stay as they are, so that every weight is the very same number; all
others are dequantized by the package gguf.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..linear import CanonicalLinear
from ..optimize import optimize
from ..plan import is_linear
from ..quantization import WeightOnlyQuantConfig
from .ggml_blocks import EXACT, GROUP, canonical_blocks
from .gguf_header import Header, TensorInfo, read_header
from .gguf_rope import FACTORS, rope_scaling
from .reader import Weight
from .stored import untie

#: Sizes of a configuration that can be no larger than the largest dimension of a tensor.
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "num_attention_heads", "num_key_value_heads")
_FLOATS = ("F32", "F16", "BF16", "F64")
_CHUNK = 1 << 22  # values dequantized at a time


def load(
    path: str | os.PathLike[str],
    dtype: torch.dtype | str = "auto",
    quantization_config: WeightOnlyQuantConfig | None = None,
    compute_dtype: str = "auto",
    strict: bool = False,
    **options: Any,
) -> Any:
    """Return the optimized model of a GGUF file; linears in Q4_0, Q8_0, Q5_0 and IQ4_NL keep their exact weights.

    Args:
        path: of the file (not split). The tokenizer is in it too: ``AutoTokenizer.from_pretrained(directory, gguf_file=name)``.
        dtype: of everything that stays floating point, to which embeddings in blocks are rounded; "auto": float32 if nothing in
            the file is smaller, float16 if that is all it has beside float32, else bfloat16.
        quantization_config: how linears of other types are quantized anew; None: they stay floating point, and a warning says so.
        compute_dtype: of the products, as in `WeightOnlyQuantConfig`; not read when that is given.
        strict: raise when a linear's blocks have no exact counterpart, and whatever `optimize` raises for.
        options: of `optimize`, such as kv_dtype.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: the file is damaged, of a model that transformers cannot name the tensors of, lacks a tensor, or holds values
            that are NaN or infinite; or see strict.
    """
    model, inexact = read_model(path, dtype)
    if inexact and quantization_config is None:
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(inexact.values()).most_common())
        message = f"{os.fspath(path)} has linears of types without an exact counterpart here ({kinds}; exact: {', '.join(EXACT)})"
        if strict:
            raise ValueError(f"{message}; pass a quantization_config to quantize these anew, or strict=False")
        warnings.warn(f"{message}: they stay {model.dtype}", stacklevel=2)
    config = quantization_config or _stored_config(model, compute_dtype)
    return optimize(model, inplace=True, quantization_config=config, strict=strict, **options)


def read_model(path: str | os.PathLike[str], dtype: torch.dtype | str = "auto") -> tuple[Any, dict[str, str]]:
    """Return the model with `CanonicalLinear`s, not yet optimized, and its linears that were dequantized: name -> ggml type."""
    if dtype not in ("auto", torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype is {dtype!r}; valid: 'auto', torch.float32, torch.bfloat16, torch.float16")
    file = _File(path)
    return _Model(file, dtype if isinstance(dtype, torch.dtype) else _dtype(file)).read()


class _File:
    """A GGUF file, checked."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            import gguf
        except ImportError:
            raise ImportError("GGUF files need the package gguf: pip install llmrt[gguf]") from None
        self.path = os.fspath(path)
        self._package = gguf
        self.kinds = {int(kind): kind.name for kind in gguf.GGML_QUANT_SIZES}
        blocks = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
        self.blocks = blocks
        self.header: Header = read_header(self.path, blocks)
        self.architecture: str = self.header.values["general.architecture"]

    def configuration(self) -> Any:
        """Return transformers' configuration.

        Raises:
            ValueError: transformers knows no such model, or the metadata contradict the tensors.
        """
        from transformers import CONFIG_MAPPING
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        try:
            fields = load_gguf_checkpoint(self.path, return_tensors=False)["config"]
            width = self.header.values.get(f"{self.architecture}.attention.key_length")
            if width is not None:  # transformers reads it for some architectures only
                fields["head_dim"] = width
            largest = max((max(t.shape) for t in self.header.tensors.values()), default=0)
            for key in _SIZES:
                if key in fields and not 0 < _largest(fields[key]) <= largest:
                    raise ValueError(f"{key} is {fields[key]!r:.100}; its largest tensor has a dimension of {largest}")
            layers = fields.get("num_hidden_layers")
            if not isinstance(layers, int) or not 0 < layers <= len(self.header.tensors):
                raise ValueError(f"num_hidden_layers is {layers!r:.100}; it has {len(self.header.tensors)} tensors")
            factors = self.header.tensors.get(FACTORS)
            scaling = rope_scaling(
                self.header.values, self.architecture, None if factors is None else self.floats(factors), fields
            )
            if scaling is not None:
                fields["rope_scaling"] = scaling
            return CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
        except Exception as error:  # whatever strange metadata make transformers raise
            raise ValueError(f"{self.path}: no configuration can be made of its metadata: {error!r:.500}") from error

    def kind(self, info: TensorInfo) -> str:
        """Return the name of a tensor's type."""
        return self.kinds[info.kind]

    def bytes_of(self, info: TensorInfo) -> Tensor:
        """Return a tensor's bytes, uint8 [rows, bytes of a row], in memory of their own."""
        values, size = self.blocks[info.kind]
        row = info.shape[-1] // values * size
        with open(self.path, "rb") as file:
            file.seek(info.start)
            content = bytearray(info.size)
            if file.readinto(content) != info.size:
                raise ValueError(f"{self.path} became shorter while it was read")
        return torch.frombuffer(content, dtype=torch.uint8).view(-1, row)

    def dequantized(self, kind: int) -> Callable[[Tensor], Tensor]:
        """Return the function that dequantizes rows of bytes of a type to float32."""
        numpy_kind = self._package.GGMLQuantizationType(kind)

        def function(rows: Tensor) -> Tensor:
            try:
                result = self._package.quants.dequantize(rows.contiguous().numpy(), numpy_kind)
            except NotImplementedError as error:
                raise ValueError(f"{self.path}: {error}") from None
            return torch.from_numpy(result).clone()

        return function

    def floats(self, info: TensorInfo, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor dequantized; ValueError if it has NaN or infinite values."""
        rows, function = self.bytes_of(info), self.dequantized(info.kind)
        result = torch.empty((rows.shape[0], info.shape[-1]), dtype=dtype)
        step = max(1, _CHUNK // info.shape[-1])
        for start in range(0, rows.shape[0], step):
            part = function(rows[start : start + step])
            if not bool(torch.isfinite(part).all()):
                raise ValueError(f"{self.path}: {info.name} has NaN or infinite values; the file is damaged")
            result[start : start + step] = part
        return result.view(info.shape)


class _Model:
    """Fills a model from a file."""

    def __init__(self, file: _File, dtype: torch.dtype) -> None:
        """Make the model without memory for its parameters, and ask transformers for the names."""
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM
        from transformers import modeling_gguf_pytorch_utils as names

        self.file, self.dtype = file, dtype
        config = file.configuration()
        try:
            with init_empty_weights(include_buffers=False):
                self.model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            processor = names.TENSOR_PROCESSORS.get(file.architecture, names.TensorProcessor)
            self.processor = processor(config=config.to_dict())
            self.names: dict[str, str] = names.get_gguf_hf_weights_map(self.model, self.processor)
        except Exception as error:  # sizes that do not go together
            raise ValueError(f"{file.path}: no model can be made of its metadata: {error!r:.500}") from error
        self.converted: dict[str, Any] = {"tensors": {}}
        self.inexact: dict[str, str] = {}

    def read(self) -> tuple[Any, dict[str, str]]:
        """Return the model and its linears that were dequantized."""
        model, tensors = self.model, self.file.header.tensors
        self._check()
        head = model.get_output_embeddings()
        head_name = next((n for n, m in model.named_modules() if m is head), "")
        embedding = next((n for n, m in model.named_modules() if m is model.get_input_embeddings()), "")
        tied = model.config.get_text_config(decoder=True).tie_word_embeddings
        for info in tensors.values():
            name = self.names.get(info.name, "")
            if info.name == FACTORS:
                continue
            if tied and name == f"{embedding}.weight" and self._exact(head_name, info):
                self._set_linear(head_name, info)
            if name.endswith(".weight") and self._exact(name[:-7], info):
                self._set_linear(name[:-7], info)
            else:
                self._set_floats(name, info)
        for name, tensor in self.converted["tensors"].items():
            self._set(name, tensor.to(self.dtype))
        untie(model)
        model.tie_weights()
        lacking = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.device.type == "meta"]
        if lacking:
            raise ValueError(f"{self.file.path} has nothing for {', '.join(lacking[:3])} ({len(lacking)} tensors)")
        return model.eval(), self.inexact

    def _check(self) -> None:
        """Check shapes by the header, before memory is taken."""
        wanted = self.model.state_dict()
        stems = {name.removesuffix(".weight") for name in self.names}
        for info in self.file.header.tensors.values():
            name = self.names.get(info.name)
            if name is None and info.name != FACTORS and info.name.removesuffix(".weight") not in stems:
                raise ValueError(f"{self.file.path}: {info.name} has no place in {type(self.model).__name__}")
            if name is None or name not in wanted:
                continue
            shape = tuple(wanted[name].shape)
            if sorted(s for s in shape if s > 1) != sorted(s for s in info.shape if s > 1):
                raise ValueError(f"{self.file.path}: {info.name} has shape {list(info.shape)}; expected {list(shape)}")

    def _exact(self, name: str, info: TensorInfo) -> bool:
        """Return whether a module is a linear whose blocks can stay as they are."""
        linear = self.model.get_submodule(name)
        if self.file.kind(info) not in EXACT or not is_linear(linear):
            return False
        return info.shape == (linear.out_features, linear.in_features) and self._rows(info) is not None

    def _rows(self, info: TensorInfo) -> Tensor | None:
        """Return the order of rows that transformers brings a weight's rows into, None if it does something else to it."""
        before = torch.arange(info.shape[0]).view(-1, 1)
        after = self._process(info, before)
        if after is None or tuple(after.shape) != tuple(before.shape):
            return None
        return after.flatten() if torch.equal(after.sort(0).values, before) else None

    def _process(self, info: TensorInfo, values: Tensor) -> Tensor | None:
        """Return values as transformers converts them; None when it puts them elsewhere (`converted`)."""
        try:
            result = self.processor.process(
                weights=values.numpy(), name=info.name, tensor_key_mapping=self.names, parsed_parameters=self.converted
            )
        except (ValueError, KeyError, IndexError) as error:
            raise ValueError(f"{self.file.path}: {info.name} of shape {list(info.shape)}: {error}") from None
        return None if result.name is None else torch.from_numpy(result.weights)

    def _set_linear(self, name: str, info: TensorInfo) -> None:
        linear: Any = self.model.get_submodule(name)
        values, size = self.file.blocks[info.kind]
        blocks = self.file.bytes_of(info).view(info.shape[0], info.shape[1] // values, size)
        order = self._rows(info)
        assert order is not None
        if not torch.equal(order, torch.arange(len(order))):
            blocks = blocks.index_select(0, order)
        weight: Weight = canonical_blocks(info.name, self.file.kind(info), blocks, self.file.dequantized(info.kind))
        biased = linear.bias is not None
        new = CanonicalLinear(linear.in_features, linear.out_features, biased, weight.layout, self.dtype, "meta")
        new._buffers.update(weight.canonical._asdict())
        if biased and linear.bias.device.type != "meta":
            new.bias = linear.bias
        self.model.set_submodule(name, new)

    def _set_floats(self, name: str, info: TensorInfo) -> None:
        kind = self.file.kind(info)
        if kind not in ("F32", "F16", "BF16", "F64") and is_linear(
            self.model.get_submodule(name.removesuffix(".weight"))
        ):
            self.inexact[name.removesuffix(".weight")] = kind
        order = self._rows(info) if len(info.shape) == 2 else None
        if order is not None and torch.equal(order, torch.arange(len(order))):
            self._set(name, self.file.floats(info, self.dtype))  # large tables: never as a whole in float32
            return
        values = self._process(info, self.file.floats(info))
        if values is not None:
            self._set(name, values.to(self.dtype))

    def _set(self, name: str, values: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        held = module._parameters if leaf in module._parameters else module._buffers
        if held.get(leaf) is None:
            raise ValueError(f"{self.file.path}: {name} has no place in {type(self.model).__name__}")
        shape = tuple(held[leaf].shape)
        if tuple(values.shape) != shape:
            raise ValueError(f"{self.file.path}: {name} has shape {list(values.shape)}; expected {list(shape)}")
        held[leaf] = nn.Parameter(values, requires_grad=False) if held is module._parameters else values


def _dtype(file: _File) -> torch.dtype:
    kinds = {file.kind(info) for info in file.header.tensors.values()} - {"F32", "F64"}
    return torch.float32 if not kinds else torch.float16 if kinds == {"F16"} else torch.bfloat16


def _largest(value: Any) -> int:
    """Return a size; of a list, one for each layer, the largest."""
    return max(map(int, value)) if isinstance(value, list) else int(value)


def _stored_config(model: Any, compute_dtype: str) -> WeightOnlyQuantConfig | None:
    """Return the configuration of the linears as they are, None if none is in blocks."""
    kinds = Counter(m.layout.weight_dtype for m in model.modules() if isinstance(m, CanonicalLinear))
    if not kinds:
        return None
    floating = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    return WeightOnlyQuantConfig(
        weight_dtype=kinds.most_common(1)[0][0],
        compute_dtype=compute_dtype,
        scale_dtype="fp16",
        group_size=GROUP,
        lm_head=False,
        floating_modules=floating,
    )

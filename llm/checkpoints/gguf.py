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
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..linear import CanonicalLinear
from ..optimize import optimize
from ..plan import is_linear
from ..quantization import WeightOnlyQuantConfig
from .ggml_blocks import EXACT, GROUP, canonical_blocks
from .gguf_header import Header, TensorInfo, read_parts
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

    Linears of other types (K-quants) have no exact counterpart: pass a dtype, as which they are dequantized, or a quantization_config,
    by which they are quantized anew. Without either only the output head may be of such a type: it stays floating point, and a
    warning says so.

    Args:
        path: of the file, or of the first part of a split one, the others beside it. The tokenizer is in it too:
            ``AutoTokenizer.from_pretrained(directory, gguf_file=name)``.
        dtype: of everything that stays floating point, to which embeddings in blocks are rounded; "auto": float32 if nothing in
            the file is smaller, float16 if that is all it has beside float32, else bfloat16.
        quantization_config: how linears of other types are quantized anew; None: they stay floating point, if a dtype is given.
        compute_dtype: of the products, as in `WeightOnlyQuantConfig`; not read when that is given.
        strict: raise when a linear's blocks have no exact counterpart, and whatever `optimize` raises for.
        options: of `optimize`, such as kv_dtype.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: the file is damaged, of a model that transformers cannot name the tensors of, lacks a tensor, or holds values
            that are NaN or infinite; linears are of other types and neither dtype nor quantization_config is given; or see strict.
    """
    made = _prepared(path, dtype)
    if made.inexact and quantization_config is None:
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(made.inexact.values()).most_common())
        message = f"{os.fspath(path)} has weights that no packed format here holds exactly ({kinds}; exact: linears in {', '.join(EXACT)})"
        if strict or (dtype == "auto" and made.inexact.keys() - {made.head}):
            raise ValueError(
                f"{message}; pass dtype=torch.float32 to have them as ggml dequantizes them, torch.bfloat16 or torch.float16 to round "
                f"that, or a quantization_config to quantize them anew{'; or strict=False' if strict else ''}"
            )
        warnings.warn(f"{message}: they stay floating point, {made.dtype}", stacklevel=2)
    model = made.read()
    config = quantization_config or _stored_config(model, compute_dtype)
    return optimize(model, inplace=True, quantization_config=config, strict=strict, **options)


def read_model(path: str | os.PathLike[str], dtype: torch.dtype | str = "auto") -> tuple[Any, dict[str, str]]:
    """Return the model with `CanonicalLinear`s, not yet optimized, and its linears that were dequantized: name -> ggml type."""
    made = _prepared(path, dtype)
    return made.read(), made.inexact


def _prepared(path: str | os.PathLike[str], dtype: torch.dtype | str) -> _Model:
    """Return a model that is not filled yet."""
    if dtype not in ("auto", torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype is {dtype!r}; valid: 'auto', torch.float32, torch.bfloat16, torch.float16")
    file = _File(path)
    return _Model(file, dtype if isinstance(dtype, torch.dtype) else _dtype(file))


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
        self.header: Header = read_parts(self.path, blocks)
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
            if "output.weight" in self.header.tensors:  # transformers looks for it in the first part alone
                fields["tie_word_embeddings"] &= all(t.path == self.path for t in self.header.tensors.values())
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
            scaling = rope_scaling(self.header.values, self.architecture, self._factors(fields), fields)
            if scaling is not None:
                fields["rope_scaling"] = scaling
            return CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
        except Exception as error:  # whatever strange metadata make transformers raise
            raise ValueError(f"{self.path}: no configuration can be made of its metadata: {error!r:.500}") from error

    def _factors(self, fields: Mapping[str, Any]) -> Tensor | None:
        """Return what each frequency of the rotation is divided by, None where nothing is said."""
        factors = self.header.tensors.get(FACTORS)
        if factors is None:
            return None
        width = fields.get("head_dim") or _largest(fields["hidden_size"]) // _largest(fields["num_attention_heads"])
        width = self.header.values.get(f"{self.architecture}.rope.dimension_count", width)
        if factors.shape != (width // 2,):
            raise ValueError(
                f"{FACTORS} has shape {list(factors.shape)}; expected {[width // 2]}, one for each frequency"
            )
        return self.floats(factors)

    def kind(self, info: TensorInfo) -> str:
        """Return the name of a tensor's type."""
        return self.kinds[info.kind]

    def bytes_of(self, info: TensorInfo) -> Tensor:
        """Return a tensor's bytes, uint8 [rows, bytes of a row], in memory of their own."""
        values, size = self.blocks[info.kind]
        row = info.shape[-1] // values * size
        with open(info.path, "rb") as file:
            file.seek(info.start)
            content = bytearray(info.size)
            if file.readinto(content) != info.size:
                raise ValueError(f"{info.path} became shorter while it was read")
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
        ends = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        self.head, self.embedding = (next((n for n, m in self.model.named_modules() if m is end), "") for end in ends)
        self._check()
        self.inexact = self._inexact()

    def _inexact(self) -> dict[str, str]:
        """Return the weights besides the embedding that are in blocks and have to be dequantized: name -> ggml type."""
        found = {}
        for info in self.file.header.tensors.values():
            name, kind = self.names.get(info.name, ""), self.file.kind(info)
            if kind in _FLOATS or len(info.shape) < 2 or name == f"{self.embedding}.weight":
                continue
            if not (name.endswith(".weight") and self._exact(name[:-7], info)):
                found[name.removesuffix(".weight") or info.name] = kind
        return found

    def read(self) -> Any:
        """Return the model."""
        model, tensors, head_name, embedding = self.model, self.file.header.tensors, self.head, self.embedding
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
        return model.eval()

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

"""What `optimize` is told about quantization."""

from __future__ import annotations

import copy
import fnmatch
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import _C
from ..ops.formats import COMPUTES, FORMATS, SCALE_DTYPES, Layout, combinations

QUANT_METHOD = "llmrt"
METHODS = ("rtn", "gptq", "awq", "autoround")
#: Spellings of the predecessors: weight dtype -> (format, every code used).
_SPELLINGS = {
    "int4_clip": ("int4", False),
    "int4_fullrange": ("int4", True),
    "s4": ("int4", False),
    "s8": ("int8", False),
    "fp8": ("fp8_e4m3", False),
    "fp4": ("fp4_e2m1", False),
}
_SCALE_SPELLINGS = {"fp32": "f32", "float32": "f32", "bfloat16": "bf16", "fp16": "f16", "float16": "f16", "fp8": "e8m0"}
#: Tiers with dot products of bfloat16.
_BF16_TIERS = ("avx512_bf16", "amx")


class KnownFields(QuantizationConfigMixin):
    """A configuration, a dataclass, that names what it does not know when it is read from a file."""

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Return the configuration of a dict; ValueError for a field that does not exist."""
        known = [f.name for f in fields(cls)]
        unknown = [str(name) for name in config_dict if name not in known]
        if unknown:
            raise ValueError(
                f"quantization_config: this version of llmrt does not know {', '.join(map(repr, unknown))[:200]}; valid: "
                f"{', '.join(known)}"
            )
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)


@dataclass
class WeightOnlyQuantConfig(KnownFields):
    """Weight-only quantization: weights of linear layers in few bits, activations in floating point between layers.

    Args:
        weight_dtype: "int4", "int8", "nf4", "fp4_e2m1" (or "fp4"), "fp8_e4m3" (or "fp8") or "fp8_e5m2". Also "int4_clip" (= int4:
            scale absmax / 7) and "int4_fullrange" (scale from the signed extreme / -8, so that all 16 codes are used).
        compute_dtype: of the product: "int8" (activations rounded to 8 bits per row and group; not of fp8 weights), "bf16", "fp16",
            "fp32", or "auto", the fastest of each weight: int8, for fp8 weights bf16 (fp32 on a CPU without bfloat16 products).
        scale_dtype: "bf16", "fp32" or "fp16"; of fp8 weights also "e8m0" (or "fp8"), powers of two in a byte.
        scheme: "sym" or "asym" (a zero point per group; int4 and int8 only).
        group_size: input features that share a scale: 32, 64, 128, any number from 8 on, or -1 for whole rows.
        method: "rtn", rounding to nearest; "gptq", "awq" or "autoround" (its package is needed), which look at the model's inputs on
            calibration text and take longer.
        calibration: that text: a file's path, a list of texts, a list of token-id tensors [S], or None: source code of Python's
            standard library. Not saved.
        tokenizer: of that text, or its directory; None: the one in the model's directory. Not saved.
        samples: how many pieces of text.
        sequence_length: tokens of each.
        seed: of their choice.
        act_order: GPTQ rounds input features with large activations first.
        static_groups: GPTQ with act_order keeps groups of neighbouring input features. False: features that were rounded together
            share a scale, and inputs are permuted before the product.
        damping: GPTQ adds this share of the mean to the diagonal of the inputs' second moments; raised when it is too small.
        modules_to_not_convert: names, parts of names ("q_proj", "layers.0") or patterns ("*.mlp.*") of linears that stay as they
            are. Experts of a layer stay together: "experts" keeps them all.
        lm_head: the output head. True or "int8" (default): INT8, one scale per row, symmetric. The head's logits decide
            the token and it is read in whole for each one: 8 bits are lossless in practice
            and halve the 525 MB that a bfloat16 head of 128k x 2048 reads per token. "int4": as the other linears. False:
            stays floating point. Embeddings always stay floating point, also when the head was tied to them.
        fullrange: what "int4_fullrange" sets.
        floating_modules: full names of the linears that a saved model keeps floating point; written at saving.
        layouts: full name of a linear -> its layout ("int8_asym_g32_f16"), where it is not the one that the fields above give: bits
            that differ by layer. Written at saving; given to `optimize`, it quantizes these linears so.
        permuted_modules: full names of the linears whose columns a saved model keeps in another order than the input features
            (GPTQ's act-order); written at saving.
        biased_modules: full names of the linears that have a bias which the model's class does not give them; written at saving.
        source: what a conversion was made from ("gptq", "awq", ...), for information; written at saving.
        quant_method: "llmrt", how transformers finds the reader.
        alg: the predecessors' name of scheme.
        load_in_4bit, load_in_8bit: the predecessors' way to say a dtype of 4 or 8 bits: int4 or int8, unless weight_dtype is one.
        use_ggml: Q4_0 / Q8_0 numbers: groups of 32, float16 scales, symmetric.
        use_gptq: not here yet; raises.

    Raises:
        ValueError: a value is outside these; the message lists those that exist.
    """

    weight_dtype: str = "int4"
    compute_dtype: str = "auto"
    scale_dtype: str = "bf16"
    scheme: str = "sym"
    group_size: int = 128
    method: str = "rtn"
    calibration: Any = field(default=None, repr=False)
    tokenizer: Any = field(default=None, repr=False)
    samples: int = 128
    sequence_length: int = 512
    seed: int = 0
    act_order: bool = True
    static_groups: bool = True
    damping: float = 0.01
    modules_to_not_convert: list[str] | None = None
    lm_head: bool | str = True
    fullrange: bool = False
    floating_modules: list[str] | None = None
    layouts: dict[str, str] | None = None
    permuted_modules: list[str] | None = None
    biased_modules: list[str] | None = None
    source: str | None = None
    quant_method: str = QUANT_METHOD
    alg: str | None = field(default=None, repr=False)
    load_in_4bit: bool = field(default=False, repr=False)
    load_in_8bit: bool = field(default=False, repr=False)
    use_ggml: bool = field(default=False, repr=False)
    use_gptq: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        """Translate the spellings and check every value."""
        _one_of("quant_method", self.quant_method, (QUANT_METHOD,))
        for name in ("weight_dtype", "scale_dtype"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r:.100}; those that exist:\n{combinations()}")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are both True; pass one")
        self.scheme = self.alg or self.scheme
        if self.weight_dtype in _SPELLINGS:
            self.weight_dtype, self.fullrange = _SPELLINGS[self.weight_dtype]
        for wanted, bits in ((self.load_in_4bit, 4), (self.load_in_8bit, 8)):
            if wanted and not (self.weight_dtype in FORMATS and FORMATS[self.weight_dtype].bits == bits):
                self.weight_dtype = f"int{bits}"
        if self.use_ggml:
            self.group_size, self.scale_dtype, self.scheme, self.fullrange = (
                32,
                "fp16",
                "sym",
                self.weight_dtype == "int4",
            )
        self.alg, self.load_in_4bit, self.load_in_8bit, self.use_ggml = None, False, False, False
        self.scale_dtype = _SCALE_SPELLINGS.get(self.scale_dtype, self.scale_dtype)
        _one_of("weight_dtype", self.weight_dtype, (*FORMATS, "fp8", "fp4", "int4_clip", "int4_fullrange"))
        _one_of("compute_dtype", self.compute_dtype, ("auto", *COMPUTES))
        _one_of("scale_dtype", self.scale_dtype, ("bf16", "fp32", "fp16", "e8m0", "fp8", *SCALE_DTYPES))
        _one_of("scheme", self.scheme, ("sym", "asym"))
        self._check_method()
        _one_of("lm_head", self.lm_head, (True, False, "int8", "int4"))
        if self.use_gptq:
            raise ValueError(
                "use_gptq: GPTQ checkpoints cannot be read yet; load the floating-point model, method='rtn'"
            )
        if self.fullrange and self.scheme == "asym":
            raise ValueError("fullrange (int4_fullrange) is symmetric; scheme 'asym' uses every code anyway")
        if isinstance(self.modules_to_not_convert, str):
            self.modules_to_not_convert = [self.modules_to_not_convert]
        row, compute = FORMATS[self.weight_dtype], self.compute_dtype
        fits = (row.integer or self.scheme == "sym") and self.scale_dtype in row.scale_names
        if not fits or compute not in ("auto", *row.computes):
            raise ValueError(
                f"weight_dtype {row.name!r}, scheme {self.scheme!r}, scale_dtype {self.scale_dtype!r} and compute_dtype "
                f"{compute!r} do not go together; those that exist:\n{combinations()}"
            )
        if self.fullrange and not row.integer:
            raise ValueError(f"fullrange is True for {row.name!r}; it is of integers (int4, int8)")
        self._check_names()
        try:
            self.layout()
        except RuntimeError as error:
            raise ValueError(str(error)) from None

    def _check_method(self) -> None:
        _one_of("method", self.method, METHODS)
        for name in ("act_order", "static_groups"):
            _one_of(name, getattr(self, name), (True, False))
        for name, least in (("samples", 1), ("sequence_length", 2), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} is {value!r}; valid: an integer, at least {least}")
        if type(self.damping) not in (int, float) or not 0 <= self.damping <= 1:
            raise ValueError(f"damping is {self.damping!r}; valid: 0 to 1 (0.01 is usual)")

    def _check_names(self) -> None:
        for field_name in ("modules_to_not_convert", "floating_modules", "permuted_modules", "biased_modules"):
            names = getattr(self, field_name)
            if names is not None and not (isinstance(names, list | tuple) and all(isinstance(n, str) for n in names)):
                raise ValueError(f"{field_name} is {names!r}; valid: a list of names of linears, or None")
        if self.source is not None and not isinstance(self.source, str):
            raise ValueError(f"source is {self.source!r}; valid: a text or None")
        if self.layouts is not None and not isinstance(self.layouts, dict):
            raise ValueError(f"layouts is {self.layouts!r}; valid: a dict of names of linears to layouts, or None")
        for name, text in (self.layouts or {}).items():
            try:
                Layout.parse(text)
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"layouts[{name!r}]: {error}") from None

    def layout_of(self, name: str, head: bool = False) -> Layout | None:
        """Return the layout of a linear by its full name, or None when it stays floating point; head: whether it is the head."""
        if self.excluded_by(name) is not None:
            return None
        if self.layouts is not None and name in self.layouts:
            return Layout.parse(self.layouts[name])
        return self.head_layout() if head else self.layout()

    def rounds_fullrange(self, layout: Layout) -> bool:
        """Return whether quantizing to this layout uses the signed extreme / -8."""
        return self.fullrange and layout == self.layout()

    def layout(self) -> Layout:
        """Return the layout of the linears other than the head."""
        return Layout(self.weight_dtype, self.scheme == "asym", self.group_size, SCALE_DTYPES[self.scale_dtype])

    def head_layout(self) -> Layout | None:
        """Return the layout of the head, or None when it stays floating point."""
        if self.lm_head is False:
            return None
        if self.lm_head == "int4":
            scale = SCALE_DTYPES["bf16" if self.scale_dtype == "e8m0" else self.scale_dtype]
            return replace(self.layout(), weight_dtype="int4", scale_dtype=scale)
        return Layout("int8", False, -1, SCALE_DTYPES["bf16" if self.scale_dtype == "e8m0" else self.scale_dtype])

    @property
    def compute(self) -> str:
        """The compute of the linears other than the head, "auto" resolved."""
        return self.compute_for(self.layout())

    def compute_for(self, layout: Layout) -> str:
        """Return the compute of a linear with this layout, which may come from a checkpoint; "auto" is the fastest.

        Raises:
            ValueError: the format does not have the compute that was asked for.
        """
        computes = layout.format.computes
        if self.compute_dtype == "auto":
            return "int8" if "int8" in computes else "bf16" if _C.cpu_isa() in _BF16_TIERS else "fp32"
        if self.compute_dtype not in computes:
            raise ValueError(
                f"compute_dtype is {self.compute_dtype!r} for weights of {layout}; those that exist:\n{combinations()}"
            )
        return self.compute_dtype

    def excluded_by(self, name: str) -> str | None:
        """Return the entry of modules_to_not_convert that matches a module's full name, or None."""
        if name in (self.floating_modules or ()):
            return name
        for entry in self.modules_to_not_convert or ():
            if fnmatch.fnmatchcase(name, entry) or re.search(rf"(^|\.){re.escape(entry)}(\.|$)", name):
                return entry
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return what a config.json holds; `WeightOnlyQuantConfig(**d)` gives the same configuration back."""
        gone = ("alg", "load_in_4bit", "load_in_8bit", "use_ggml", "use_gptq", "calibration", "tokenizer")
        return {f.name: copy.copy(getattr(self, f.name)) for f in fields(self) if f.name not in gone}


def _one_of(name: str, value: Any, valid: tuple[Any, ...]) -> None:
    if not any(value is v or (type(value) is type(v) and value == v) for v in valid):
        raise ValueError(f"{name} is {value!r}; valid: {', '.join(repr(v) for v in dict.fromkeys(valid))}")

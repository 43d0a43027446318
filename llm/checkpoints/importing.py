"""The quantizer through which transformers loads a checkpoint for `AutoModelForCausalLM`: packed tensors in, `CanonicalLinear`s out.

transformers chooses a quantizer by the checkpoint's own `quant_method` and for most of them asks for another package. Here the
configuration is rewritten before transformers sees it: ``{"quant_method": "llmrt-import", "stored": <what the checkpoint says>}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..quantization import QUANT_METHOD, WeightOnlyQuantConfig
from .files import TensorFiles
from .native import check_device_map, check_loaded, prepare_native
from .readers import find_reader
from .stored import prepare, read_all

IMPORT_METHOD = "llmrt-import"


@register_quantization_config(IMPORT_METHOD)
class ImportConfig(QuantizationConfigMixin):
    """What a checkpoint says of its quantization.

    Args:
        stored: the `quantization_config` of its config.json.
        quant_method: "llmrt-import".
    """

    def __init__(self, stored: Any = None, quant_method: str = IMPORT_METHOD) -> None:
        """Keep it."""
        if not isinstance(stored, Mapping):
            raise ValueError(f"quantization_config.stored is {stored!r:.200}; expected an object")
        self.stored, self.quant_method = dict(stored), quant_method

    @property
    def native(self) -> WeightOnlyQuantConfig | None:
        """The configuration, if the checkpoint is one of llmrt's own."""
        return WeightOnlyQuantConfig(**self.stored) if self.stored.get("quant_method") == QUANT_METHOD else None


@register_quantizer(IMPORT_METHOD)
class Importer(HfQuantizer):
    """Reads quantized linears itself, one by one, and leaves everything else to transformers."""

    requires_calibration = False
    quantization_config: ImportConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse a device that llmrt has no kernels for."""
        check_device_map(device_map)

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        if (native := self.quantization_config.native) is not None:
            prepare_native(model, native, checkpoint_files)
            return
        self.reader = find_reader(self.quantization_config.stored)
        self.files = TensorFiles(checkpoint_files)
        prepare(model, self.reader, self.files)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.quantization_config.native is not None:
            check_loaded(model)
        else:
            read_all(model, self.reader, self.files)
        self.remove_quantization_config(model)
        return model

    def is_serializable(self) -> bool:
        """`optimize` replaces this quantizer before anything is saved."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Quantized weights have no gradient."""
        return False

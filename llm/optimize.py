"""`optimize`: a Hugging Face model in, the same model faster out."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from .. import devices
from .algorithms import calibrate
from .cache import choose_kv_dtype, stored_dtype
from .convert import Converter
from .deployment import undeployable
from .linear import CanonicalLinear, QuantLinear, SiblingLinear
from .memory import weight_bytes
from .moving import move
from .plan import Planner
from .quantization import WeightOnlyQuantConfig
from .quantized import added_biases, saved_config, stored_config
from .sharing import share_copy
from .static.config import StaticQuantConfig
from .static.observing import is_observed, observe, without_observers
from .static.plan import StaticConverter, StaticPlanner
from .weight_checks import check_weights

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def optimize(
    model: Any,
    optimizer: Any = None,
    dtype: torch.dtype | None = None,
    inplace: bool = False,
    device: str | torch.device = "cpu",
    quantization_config: WeightOnlyQuantConfig | StaticQuantConfig | None = None,
    qconfig_summary_file: str | os.PathLike[str] | None = None,
    low_precision_checkpoint: Any = None,
    sample_inputs: Any = None,
    deployment_mode: bool = True,
    strict: bool = False,
    kv_dtype: str | torch.dtype | None = None,
) -> Any:
    """Return the model with its linears, experts, norms, rotations, feed-forward parts, attention and cache run by llmrt's operators.

    The result is of the same Hugging Face class: generate, pipelines, streamers, beam search, assisted generation and
    save_pretrained keep working. A model without a row in llm/families is matched by structure, each part confirmed by a numeric probe,
    and runs a few tokens once to see whether attention and cache fit it. `result.optimization_report` says per module what was
    replaced and what was not and why. Everything that can be checked is checked before the first change, so a refused model is as
    it was.

    Args:
        model: a transformers model with a decoder and a language-model head, in eval mode, on the CPU.
        optimizer: must be None; this is for inference.
        dtype: float32, bfloat16 or float16 for everything that stays floating point; None: as it is.
        inplace: False returns a copy that shares the floating-point weights that stay; the given model stays usable and unchanged.
            True changes the given model and frees every float weight as soon as it is quantized: the peak is the model plus one
            weight (plus the quantized weights and one layer if the method calibrates or smooths, which changes nothing before it is done).
            Should memory run out in the middle of that, the model is marked unusable and an error says so.
        device: what the result runs on: "cpu", "xpu" (Intel GPUs) or "cuda" (a guest: Triton kernels), also "xpu:1". The model is given on
            the CPU and quantized there; the packed weights have the same bytes everywhere. The given model stays on the CPU
            unless inplace is True. Token ids and masks belong on the device too.
        quantization_config: a `WeightOnlyQuantConfig`, a `StaticQuantConfig`, or None for floating point. Weights that stay
            floating point move to pages of 2 MB where the system has them (0.3 to 2 s per GB, unless `dtype` copies them anyway).
        qconfig_summary_file: for a `StaticQuantConfig`: what `save_qconf_summary` wrote. Without it the result is the model as it is,
            prepared for calibration: run samples through it, save the summary, and call this function again with the summary
            and either model. Options other than inplace take effect then.
        low_precision_checkpoint: a state dict with quantized weights of linears, by their names in the model, or (state dict,
            configuration): the configuration maps keys (weight_key, scale_key, zero_point_key, bias_key) or says quant_method,
            bits, group_size and desc_act; without one the layout of GPTQ is assumed, and a warning and the report say so.
            See llm/checkpoints/low_precision.py. These linears may be on the meta device; other tensors of the state dict are
            not read. A bias is the state dict's, else the model's. Linears without weights there are quantized if there is a
            quantization_config and stay floating point otherwise.
        sample_inputs: not read: graphs are captured from the first calls.
        deployment_mode: True runs calls with a `KVCache`, as generate makes them, as captured graphs of operators; False always runs
            the modules. Attributes of modules, such as an epsilon, are then read once.
        strict: raise `OptimizationError`, with the reasons, if anything would stay unoptimized that has a faster form.
        kv_dtype: what generate's cache stores keys and values as: "int8" (codes with a scale per token and head: about half the
            bytes of bfloat16), "float16", or None for the model's dtype. Kept in the model's configuration.

    Returns:
        The optimized model.

    Raises:
        ValueError: an argument is unusable; the message says which and what would be valid.
        OptimizationError: see strict.
        RuntimeError: the device is absent.
    """
    _check_arguments(model, optimizer, dtype, quantization_config, qconfig_summary_file, low_precision_checkpoint)
    target_device = devices.check(device)
    settings = dtype, inplace, target_device, deployment_mode, strict, kv_dtype, qconfig_summary_file
    if low_precision_checkpoint is None:
        return _optimized(model, quantization_config, *settings)
    from .checkpoints.state_dict import TakeOver  # its package imports this module

    target = model if inplace else share_copy(model)
    taken = TakeOver(target, low_precision_checkpoint, quantization_config)
    try:
        taken.check_complete()
        return _optimized(target, quantization_config, *settings, taken)
    except BaseException:
        taken.undo()
        raise


def _optimized(
    model: Any,
    quantization_config: WeightOnlyQuantConfig | StaticQuantConfig | None,
    dtype: torch.dtype | None,
    inplace: bool,
    device: torch.device,
    deployment_mode: bool,
    strict: bool,
    kv_dtype: str | torch.dtype | None,
    qconfig_summary_file: str | os.PathLike[str] | None,
    taken: Any = None,
) -> Any:
    """Do what `optimize` says with checked arguments; taken: the `TakeOver` of a low-precision checkpoint."""
    if is_observed(model):
        model = without_observers(model if inplace else share_copy(model))
    if quantization_config is None and any(isinstance(m, CanonicalLinear) for m in model.modules()):
        quantization_config = stored_config(model)
    planner: Planner
    if isinstance(quantization_config, StaticQuantConfig):
        if qconfig_summary_file is None and not _is_stored(model):
            prepared = model if inplace else share_copy(model)
            return observe(prepared, StaticPlanner(prepared, quantization_config).plan(), quantization_config)
        planner = StaticPlanner(model, quantization_config, qconfig_summary_file, dtype)
    else:
        planner = Planner(model, quantization_config)
    stored = stored_dtype(kv_dtype, dtype or model.dtype)
    plan = planner.plan()
    static = (planner.inputs, planner.folds, planner.saved_config()) if isinstance(planner, StaticPlanner) else None
    del planner  # it holds the modules whose weights shall be freed one by one
    check_weights(model, plan)
    if stored is not None and not plan.cache:
        raise ValueError(
            f"kv_dtype is {kv_dtype!r}, but {type(model).__name__} does not use llmrt's cache: leave it out"
        )
    reason = undeployable(model) if deployment_mode else None
    if reason is not None:
        plan.report.add("", "forward", reason=reason, expected=False)
    if strict:
        plan.report.raise_if_unoptimized()
    calibrated = None
    if isinstance(quantization_config, WeightOnlyQuantConfig):
        calibrated = calibrate(model, plan, quantization_config)
    if taken is not None:
        plan.report.add("", "checkpoint", taken.note)
        taken.forget()  # nothing is refused from here on
    biased = added_biases(model)
    plan.report.bytes_before = weight_bytes(model)
    result = model if inplace else share_copy(model)
    options = result, plan, dtype, not inplace, deployment_mode and reason is None, strict
    if static is not None:
        StaticConverter(*static[:2], *options).run()
    else:
        Converter(*options, calibrated).run()
    plan.report.bytes_after = weight_bytes(result)
    result.optimization_report = plan.report
    move(result, device)
    choose_kv_dtype(result, kv_dtype)
    if quantization_config is not None:
        _mark_quantized(result, quantization_config if static is None else static[2], biased)
    return result


def _is_stored(model: Any) -> bool:
    """Return whether a model is a quantized checkpoint that was loaded."""
    return any(isinstance(module, CanonicalLinear) for module in model.modules())


def _mark_quantized(model: Any, config: WeightOnlyQuantConfig | StaticQuantConfig, biased: list[str]) -> None:
    """Make `save_pretrained` of a quantized model write what `from_pretrained` needs."""
    if isinstance(config, StaticQuantConfig):
        floating = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        saved: Any = replace(config, floating_modules=floating)
    else:
        saved = replace(saved_config(model, config, biased), calibration=None, tokenizer=None)
    model.config.quantization_config = saved
    model.hf_quantizer = AutoHfQuantizer.from_config(saved, pre_quantized=True)  # the class is in llm/checkpoints
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.model_tags = [*(tag for tag in model.model_tags or () if tag != "llmrt"), "llmrt"]


def _check_arguments(
    model: Any,
    optimizer: Any,
    dtype: Any,
    quantization_config: Any,
    qconfig_summary_file: Any,
    low_precision_checkpoint: Any,
) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model is a {type(model).__name__}; expected a transformers PreTrainedModel")
    if getattr(model, "optimization_report", None) is not None:
        raise ValueError("the model is optimized already; call optimize on the original model")
    if optimizer is not None:
        raise ValueError("optimizer must be None: llmrt optimizes for inference only")
    training = next((name for name, m in model.named_modules() if m.training), None)
    if training is not None:
        raise ValueError(f"{training or 'the model'} is in training mode; call model.eval() first")
    if model.get_output_embeddings() is None:
        raise ValueError(f"{type(model).__name__} has no language-model head; load it as a CausalLM class")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype}; valid: torch.float32, torch.bfloat16, torch.float16")
    _check_tensors(model, dtype, low_precision_checkpoint is not None)
    static = isinstance(quantization_config, StaticQuantConfig)
    if qconfig_summary_file is not None and not static:
        raise ValueError("qconfig_summary_file is for static INT8; pass it with a StaticQuantConfig")
    if qconfig_summary_file is None and is_observed(model):
        raise ValueError(
            "the model is prepared for calibration: run samples through it, call llm.save_qconf_summary(model, file), then "
            "optimize with qconfig_summary_file=file"
        )
    if static and low_precision_checkpoint is not None:
        raise ValueError("low_precision_checkpoint has weights of its own; leave out the StaticQuantConfig")
    if quantization_config is not None and not static and not isinstance(quantization_config, WeightOnlyQuantConfig):
        raise ValueError(
            f"quantization_config is a {type(quantization_config).__name__}; valid: llm.WeightOnlyQuantConfig, "
            "llm.StaticQuantConfig or None"
        )


def _check_tensors(model: Any, dtype: torch.dtype | None, may_lack: bool) -> None:
    """Raise ValueError for tensors on another device; may_lack: linears may be on the meta device."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu" and not (may_lack and tensor.is_meta):
            raise ValueError(
                f"{name} is on {tensor.device}; expected a model on the CPU (load it with device_map='cpu')"
            )
    for name, parameter in model.named_parameters():
        if dtype is None and parameter.is_floating_point() and parameter.dtype not in _DTYPES:
            raise ValueError(f"{name} has dtype {parameter.dtype}; pass dtype=torch.float32, bfloat16 or float16")
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | SiblingLinear):
            raise ValueError(f"{name} is quantized by llmrt already")

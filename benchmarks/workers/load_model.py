"""Worker of benchmarks/load.py: makes one model ready in one way and writes what that took as JSON. See `WAYS`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the checkout, where llmrt is not installed
from protocol import peak_memory_bytes


def parse() -> argparse.Namespace:
    """Return the options."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("way", choices=(*WAYS, "make"))
    options.add_argument("directory", type=Path)
    options.add_argument("--shape")
    options.add_argument("--threads", type=int, required=True)
    options.add_argument("--config", type=json.loads, required=True, help="of WeightOnlyQuantConfig")
    return options.parse_args()


def make(args: argparse.Namespace) -> dict[str, Any]:
    """Write the model with random weights in bfloat16, optimize it and write that; return the seconds of both."""
    import torch

    from llmrt import llm
    from llmrt.llm.families.shapes import shape_config
    from llmrt.llm.random_weights import bare_model, fill_linears

    model = bare_model(shape_config(args.shape), torch.bfloat16)
    fill_linears(model)
    config = llm.WeightOnlyQuantConfig(**args.config)
    seconds = {"save float": _timed(lambda: model.save_pretrained(args.directory / "float"))}
    write_gptq(model, args.directory / "gptq", config.group_size)
    seconds["optimize"] = _timed(lambda: llm.optimize(model, inplace=True, quantization_config=config))
    seconds["save quantized"] = _timed(lambda: model.save_pretrained(args.directory / "quantized"))
    return {"seconds": seconds, "weight_bytes": model.optimization_report.bytes_after}


def write_gptq(model: Any, directory: Path, group: int) -> None:
    """Write the model as a GPTQ checkpoint of 4 bits, symmetric, with random codes; embedding, norms and an untied head as they are."""
    import torch
    from safetensors.torch import save_file

    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not (tied and "lm_head" in name)}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            del tensors[f"{name}.weight"]
            n, k = module.weight.shape
            tensors[f"{name}.qweight"] = torch.randint(-(2**31), 2**31 - 1, (k // 8, n), dtype=torch.int32)
            tensors[f"{name}.qzeros"] = torch.full((k // group, n // 8), 0x77777777, dtype=torch.int32)  # 8, less one
            tensors[f"{name}.scales"] = torch.full((k // group, n), 0.01, dtype=torch.float16)
            tensors[f"{name}.g_idx"] = torch.arange(k, dtype=torch.int32) // group
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    stored = {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": True, "desc_act": False}
    config = {**model.config.to_dict(), "quantization_config": stored}
    (directory / "config.json").write_text(json.dumps(config, default=str))


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def optimize(directory: Path, config: Any) -> Any:
    """Load the float model, then optimize it."""
    from transformers import AutoModelForCausalLM

    from llmrt import llm

    model = AutoModelForCausalLM.from_pretrained(directory / "float").eval()
    return llm.optimize(model, inplace=True, quantization_config=config)


def quantize_on_load(directory: Path, config: Any) -> Any:
    """Load the float model with a quantization config."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory / "float", quantization_config=config)


def reload(directory: Path, config: Any) -> Any:
    """Load the quantized model."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory / "quantized")


def load_gptq(directory: Path, config: Any) -> Any:
    """Load the GPTQ checkpoint; its head stays floating point."""
    from llmrt import llm

    return llm.AutoModelForCausalLM.from_pretrained(directory / "gptq")


WAYS = {
    "load and optimize": optimize,
    "quantize on load": quantize_on_load,
    "reload quantized": reload,
    "load GPTQ": load_gptq,
}


def resident_bytes() -> int:
    """Return what the process occupies now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def load(args: argparse.Namespace) -> dict[str, Any]:
    """Make the model ready in one way and generate twice."""
    start = time.perf_counter()
    import torch

    from llmrt import llm

    imported, before = time.perf_counter(), resident_bytes()
    config = llm.WeightOnlyQuantConfig(**args.config)
    model = WAYS[args.way](args.directory, config)
    loaded, peak = time.perf_counter(), peak_memory_bytes()
    tokens = torch.arange(1, 9).unsqueeze(0)

    def first_token() -> float:
        return _timed(lambda: model.generate(tokens, max_new_tokens=1, do_sample=False, pad_token_id=0))

    return {
        "import_s": imported - start,
        "load_s": loaded - imported,
        "first_token_s": first_token(),
        "next_first_token_s": first_token(),
        "before_bytes": before,
        "peak_bytes": peak,
        "after_bytes": resident_bytes(),
    }


def main() -> None:
    """Run and print one line of JSON last."""
    args = parse()
    import torch
    from transformers.utils import logging

    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    print(json.dumps(make(args) if args.way == "make" else load(args)))


if __name__ == "__main__":
    main()

"""Peak memory of optimizing in place and of loading, measured by the kernel in a process of its own."""

import json
import mmap
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gptq_directories import edit_json, save_gptq
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmrt import ops
from llmrt.llm.memory import FilePages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SIZES = {
    "vocab_size": 16000,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}

START = """
import json, sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from llmrt import llm
from llmrt.llm.memory import return_free_memory

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def measured(make):
    return_free_memory()
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
    made = make()
    peak, after = status("VmHWM"), status("VmRSS")
    with torch.no_grad():
        finite = bool(made(torch.arange(9)[None]).logits.isfinite().all())
    seen = {"before": before, "peak": peak, "after": after, "finite": finite}
    return made, {**seen, "result": made.optimization_report.bytes_after}

torch.set_num_threads(1)
config = LlamaConfig(**json.loads(sys.argv[2]))
quantization = llm.WeightOnlyQuantConfig()
warm = LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 1, "vocab_size": 64})
warm = llm.optimize(LlamaForCausalLM(warm).bfloat16().eval(), inplace=True, quantization_config=quantization)
"""

IN_PLACE = """
with torch.device("meta"):
    model = LlamaForCausalLM(config).bfloat16().eval()
model.to_empty(device="cpu")
for parameter in model.parameters():
    parameter.data.view(-1).copy_(torch.arange(parameter.numel()).remainder_(251).sub_(125).bfloat16() / 999)
model.model.rotary_emb = type(model.model.rotary_emb)(config)
del parameter  # the head's weight
model.save_pretrained(sys.argv[1] + "/float")
model_bytes = sum(p.nbytes for p in model.parameters())
_, seen = measured(lambda: llm.optimize(model.eval(), inplace=True, quantization_config=quantization))
model.save_pretrained(sys.argv[1] + "/quantized")
print(json.dumps({**seen, "model": model_bytes}))
"""

LOAD = """
warm.save_pretrained(sys.argv[1] + "/warm")
del warm
AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/warm")
seen = {}
for name, options in (("quantized", {}), ("float", {"quantization_config": quantization})):
    path = f"{sys.argv[1]}/{name}"
    model, seen[name] = measured(lambda: AutoModelForCausalLM.from_pretrained(path, **options))
    del model
path = f"{sys.argv[1]}/gptq"
_, seen["gptq"] = measured(lambda: llm.AutoModelForCausalLM.from_pretrained(path))
print(json.dumps(seen))
"""

LARGEST = 16000 * 512  # elements of the head


def run(code: str, directory: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", START + code, str(directory), json.dumps(SIZES)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_peak_and_final_memory(tmp_path: Path) -> None:
    seen = run(IN_PLACE, tmp_path)
    assert seen["finite"]
    assert seen["model"] > 120e6, "large against what else a process does"
    assert seen["peak"] - seen["before"] <= 3 * LARGEST  # the model plus its largest weight as codes and packed
    rest = seen["before"] - seen["model"]  # interpreter and libraries
    assert seen["after"] - rest <= 1.1 * seen["result"]
    assert seen["result"] < 0.42 * seen["model"]  # INT4 with bfloat16 scales, an INT8 head, a bfloat16 embedding
    save_gptq(LlamaForCausalLM(LlamaConfig(**SIZES)).bfloat16(), tmp_path / "gptq")
    edit_json(tmp_path / "gptq/config.json", lambda c: c["quantization_config"].update(quant_method="gptq"))
    loads = run(LOAD, tmp_path)
    embedding = 2 * LARGEST  # stays in the file until rows of it are looked up
    for name, load in loads.items():
        assert load["finite"], name
        packed = load["result"] - embedding
        other = 24e6 if name == "gptq" else 12e6  # its canonical tensors, were they kept, take 31 MB more
        assert load["after"] - load["before"] <= packed + other, name
        assert load["peak"] - load["before"] <= packed + 4 * LARGEST + other, name  # the head: bfloat16 and its codes


def test_written_mappings_are_left_alone(tmp_path: Path) -> None:
    size = 1 << 20
    (tmp_path / "zeros").write_bytes(bytes(8 * size))
    (tmp_path / "more").write_bytes(bytes(8 * size))
    model = nn.Module()
    for name in ("zeros", "more"):
        storage = torch.UntypedStorage.from_file(str(tmp_path / name), False, 8 * size)
        model.register_buffer(name, torch.tensor([], dtype=torch.uint8).set_(storage))
    assert len(FilePages(model)._spans) == 2
    model.zeros[5 * size] = 7
    pages = FilePages(model)
    assert len(pages._spans) == 1
    pages.read_ahead([model.zeros, model.more])
    assert model.more.sum() == 0 and model.zeros.sum() == 7
    pages.release()
    assert model.more.sum() == 0 and model.zeros.sum() == 7


def huge_bytes(address: int, size: int) -> int:
    """Return how much of a range's mappings is on huge pages."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) < address + size and address < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            total += 1024 * int(line.split()[1])
    return total


def test_packed_weights_stand_on_huge_pages() -> None:
    size = 16 << 20
    control = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    control.madvise(mmap.MADV_HUGEPAGE)
    control.write(bytes(size))
    if huge_bytes(torch.frombuffer(control, dtype=torch.uint8).data_ptr(), size) < size // 4:
        pytest.skip("the system gives no huge pages now")
    codes, scales, _ = ops.quantize_weight(torch.randn(1 << 14, 1 << 11), "int4_sym_g128_bf16")
    packed = ops.pack_weight(codes, scales, None, "int4_sym_g128_bf16", 1 << 11)
    assert packed.nbytes > size and huge_bytes(packed.data_ptr(), packed.nbytes) > size // 2

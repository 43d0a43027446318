"""Peak memory of optimizing in place, measured by the kernel in a process of its own."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, torch
from transformers import LlamaConfig, LlamaForCausalLM
from llmrt import llm
from llmrt.llm.convert import return_free_memory

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

torch.set_num_threads(1)
config = LlamaConfig(vocab_size=16000, hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
                     num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False)
quantization = llm.WeightOnlyQuantConfig()
warm = LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 1, "vocab_size": 64})
llm.optimize(LlamaForCausalLM(warm).bfloat16().eval(), inplace=True, quantization_config=quantization)
with torch.device("meta"):
    model = LlamaForCausalLM(config).bfloat16().eval()
model.to_empty(device="cpu")
for parameter in model.parameters():
    parameter.data.view(-1).copy_(torch.arange(parameter.numel()).remainder_(251).sub_(125).bfloat16() / 999)
model.model.rotary_emb = type(model.model.rotary_emb)(config)
model.eval()
del parameter  # the head's weight
model_bytes = sum(p.nbytes for p in model.parameters())
return_free_memory()
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
llm.optimize(model, inplace=True, quantization_config=quantization)
peak, after = status("VmHWM"), status("VmRSS")
report = model.optimization_report
with torch.no_grad():
    finite = bool(model(torch.arange(9)[None]).logits.isfinite().all())
print(json.dumps({"model": model_bytes, "before": before, "peak": peak, "after": after, "finite": finite,
                  "result": report.bytes_after, "largest": 16000 * 512 * 4}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_and_final_memory() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True)
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["finite"]
    assert seen["model"] > 120e6, "large against what else a process does"
    assert seen["peak"] - seen["before"] <= seen["largest"]  # the model plus one float32 copy of its largest weight
    rest = seen["before"] - seen["model"]  # interpreter and libraries
    assert seen["after"] - rest <= 1.1 * seen["result"]
    assert seen["result"] < 0.42 * seen["model"]  # INT4 with bfloat16 scales, an INT8 head, a bfloat16 embedding

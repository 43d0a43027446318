"""Every format saved and loaded again, compiled, captured and exported: the same numbers as the modules give.

Checkpoints of other packages become the same modules, and are saved like them: `test_foreign_checkpoints_become_the_same_modules`.
"""

import copy
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import Q4_0, Q8_0
from gptq_directories import fields
from models import padded_batch, tiny_model
from test_reader_directories import write_directory
from test_reader_models import CASES, save
from test_state_dict_checkpoint import GPTQ, packed
from test_static import samples
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmrt import llm
from llmrt.llm.dense import DenseLinear
from llmrt.llm.linear import LinearGroup, QuantLinear, SiblingLinear
from llmrt.llm.mlp import QuantGatedMLP
from llmrt.ops.formats import FORMATS
from llmrt.passes import llmrt_backend

#: Options of every row of the table of formats, symmetric and asymmetric; the scales' dtypes take turns.
KINDS: dict[str, dict[str, Any]] = {
    f"{name} {scheme}": {
        "weight_dtype": name,
        "scheme": scheme,
        "scale_dtype": scale,
        "lm_head": False,
        "group_size": group,
    }
    for name, row in FORMATS.items()
    for scheme, scale, group in (
        ("sym", {"int4": "bf16", "fp8_e4m3": "e8m0", "fp8_e5m2": "fp16"}.get(name, "fp32"), 32),
        *((("asym", "fp16", 20),) if row.integer else ()),
    )
}
WEIGHT_ONLY = ("QuantLinear", "LinearGroup", "QuantGatedMLP")
STATIC = "static int8"
ORDERED = "int4 act-order"
BATCH = padded_batch(2, 7)


def one_layer() -> Any:
    model = copy.deepcopy(tiny_model("llama"))
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    model.config.layer_types = None
    return model


def ordered() -> dict[str, Tensor]:
    """Return a GPTQ state dict whose groups are in random order, one order for linears with a common input."""
    state = packed(one_layer())
    orders: dict[tuple[str, int], Tensor] = {}
    random = torch.Generator().manual_seed(0)  # the same model at every call
    for key in [key for key in state if key.endswith("g_idx")]:
        size = len(state[key])
        owner = key.rsplit(".", 2)[0]
        state[key] = state[key][orders.setdefault((owner, size), torch.randperm(size, generator=random))].contiguous()
    return state


@cache
def summary(directory: Path) -> Path:
    prepared = llm.optimize(one_layer(), quantization_config=llm.StaticQuantConfig())
    prepared(**samples(1)[0])
    llm.save_qconf_summary(prepared, directory / "q.json")
    return directory / "q.json"


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return a function: (kind, deployment_mode) -> the quantized model."""

    @cache
    def made(kind: str, deployed: bool = False) -> Any:
        options: dict[str, Any] = {"deployment_mode": deployed}
        model = one_layer()
        if kind == STATIC:
            file = summary(tmp_path_factory.getbasetemp())
            options.update(quantization_config=llm.StaticQuantConfig(), qconfig_summary_file=file)
        elif kind == ORDERED:
            options.update(low_precision_checkpoint=(ordered(), GPTQ))
        else:
            options.update(quantization_config=llm.WeightOnlyQuantConfig(**KINDS[kind]))
        return llm.optimize(model, **options)

    with torch.no_grad():
        yield made


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def same_tensors(a: Any, b: Any) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        other = second[key]
        assert tensor.dtype == other.dtype and torch.equal(bits(tensor), bits(other)), key


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def parts(model: Any) -> set[tuple[str, str, bool]]:
    """Return the quantized modules of a model: class, weight format and scheme, whether columns have an order of their own."""
    found = set()
    for module in model.modules():
        if isinstance(module, QuantLinear | QuantGatedMLP):
            scheme = "asym" if module.layout.asymmetric else "sym"
            found.add((type(module).__name__, f"{module.layout.weight_dtype} {scheme}", module.perm is not None))
    return found


def comes_back(model: Any, directory: Path) -> Any:
    """Save a model in shards, load it, compare everything; return the loaded one."""
    model.save_pretrained(directory, max_shard_size="20KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert type(loaded) is type(model)
    same_tensors(model, loaded)
    assert parts(loaded) == parts(model)
    batch = padded_batch()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    return loaded


@pytest.mark.parametrize("kind", [*KINDS, STATIC, ORDERED])
def test_saved_in_shards_and_loaded_bit_equal(kind: str, make: Callable[..., Any], tmp_path: Path) -> None:
    classes = {name for name, form, ordered in parts(make(kind)) if ordered == (kind == ORDERED)}
    wanted = {"StaticLinear", "StaticGroup", "StaticGatedMLP"} if kind == STATIC else {*WEIGHT_ONLY}
    assert classes == wanted, "each class is in the model that is saved, compiled, captured and exported"
    loaded = comes_back(make(kind), tmp_path / "first")
    comes_back(loaded, tmp_path / "second")


@pytest.mark.parametrize(
    "kind", ["int4 asym", "nf4 sym", "fp8_e4m3 sym", STATIC, ORDERED]
)  # one of each kind of kernel
def test_captured_graphs_give_the_same_tokens(kind: str, make: Callable[..., Any]) -> None:
    fast, slow = make(kind, True), make(kind)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    got, expected = (model.generate(**BATCH, **options) for model in (fast, slow))
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), rtol=1e-5, atol=1e-5)
    assert len(fast.optimization_report.graphs) == 2 and not fast.forward.reasons


@pytest.mark.parametrize("kind", [*KINDS, STATIC, ORDERED])
def test_compiled(kind: str, make: Callable[..., Any]) -> None:
    model = make(kind)
    compiled = torch.compile(model, backend=llmrt_backend, fullgraph=True)
    got, expected = (m(**BATCH, use_cache=False).logits for m in (compiled, model))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, STATIC, ORDERED])
def test_exported_saved_and_loaded(kind: str, make: Callable[..., Any], tmp_path: Path) -> None:
    model = make(kind)
    program = llm.export(model)
    torch.export.save(program, tmp_path / "model.pt2")
    run, cached = torch.export.load(tmp_path / "model.pt2").module(), llm.CachedModel(model)
    caches = [cached.caches(2, 8) for _ in range(2)]
    ids, mask = BATCH["input_ids"], BATCH["attention_mask"]
    for _ in range(2):
        got, expected = (f(ids, mask, *kept) for f, kept in zip((run, cached), caches, strict=True))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        ids, mask = expected[:, -1:].argmax(-1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)


def directory_of(case: str) -> Callable[[Path], Any]:
    def load(path: Path) -> Any:
        save(CASES[case], path)
        return llm.AutoModelForCausalLM.from_pretrained(path, deployment_mode=False)

    return load


def directory_by(method: str) -> Callable[[Path], Any]:
    def load(path: Path) -> Any:
        write_directory(path, method)
        return llm.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, deployment_mode=False)

    return load


def gguf_file(kind: int) -> Callable[[Path], Any]:
    def load(path: Path) -> Any:
        pytest.importorskip("gguf")
        from test_reader_gguf import tiny_file  # skipped as a whole without the package

        tiny_file(path / "model.gguf", linears=kind, head=kind)
        return llm.AutoModelForCausalLM.from_pretrained(path / "model.gguf", deployment_mode=False)

    return load


def state_dict(_: Path) -> Any:
    state = packed(copy.deepcopy(tiny_model("llama")))
    return llm.optimize(tiny_model("llama"), low_precision_checkpoint=(state, GPTQ), deployment_mode=False)


def mapped_state_dict(_: Path) -> Any:
    state = {}
    for name, module in tiny_model("llama").named_modules():
        if name.endswith("_proj"):
            n, k = module.weight.shape
            codes, zeros = torch.randint(16, (n, k)), torch.randint(16, (n, k // 16))
            parts = {
                "packed_weight": fields(codes, 1),
                "scale": torch.rand(n, k // 16) / k**0.5,
                "packed_zp": zeros.int(),
            }
            state.update({f"{name}.{key}": value for key, value in parts.items()})
    keys = {"weight_key": "packed_weight", "scale_key": "scale", "zero_point_key": "packed_zp"}
    return llm.optimize(tiny_model("llama"), low_precision_checkpoint=(state, keys), deployment_mode=False)


FOREIGN: dict[str, tuple[Callable[[Path], Any], set[str]]] = {
    "gptq": (directory_of("gptq v1"), {"int4 asym"}),
    "gptq, zeros of 16": (directory_of("gptq v1, zeros to 16"), {"int4 asym", "int8 asym"}),
    "gptq act-order": (directory_of("gptq v2 act-order"), {"int4 asym"}),
    "gptq 3 bits": (directory_of("gptq 3 bits sym"), {"int4 sym", "int4 asym"}),
    "gptq 8 bits": (directory_of("gptq 8 bits"), {"int8 asym"}),
    "awq": (directory_of("awq"), {"int4 asym"}),
    "auto-round": (directory_of("auto-round awq"), {"int4 asym"}),
    "auto-round, mixed bits": (directory_of("auto-round mixed"), {"int4 asym", "int4 sym"}),
    "compressed-tensors": (directory_by("compressed-tensors"), {"int4 asym"}),
    "fp8": (directory_by("fp8"), {"fp8_e4m3 sym"}),
    "int8 rows": (directory_by("w8a8_int8"), {"int8 sym"}),
    "gguf q4_0": (gguf_file(Q4_0), {"int4 sym"}),
    "gguf q8_0": (gguf_file(Q8_0), {"int8 sym"}),
    "state dict": (state_dict, {"int4 asym"}),
    "state dict with a map of keys": (mapped_state_dict, {"int4 asym"}),
}


@pytest.mark.parametrize("source", FOREIGN)
def test_foreign_checkpoints_become_the_same_modules(source: str, tmp_path: Path) -> None:
    """What the tests above compile, capture and export: classes, formats and orders of columns; nothing else computes."""
    load, formats = FOREIGN[source]
    (tmp_path / "source").mkdir()
    model = load(tmp_path / "source")
    found = parts(model)
    assert {form for _, form, _ in found} <= formats <= {*KINDS}
    assert {name for name, _, _ in found} <= {*WEIGHT_ONLY}
    assert any(ordered for *_, ordered in found) == (source in ("gptq act-order", "compressed-tensors"))
    quantized = {
        *filter(lambda m: isinstance(m, QuantLinear | LinearGroup | QuantGatedMLP | SiblingLinear), model.modules())
    }
    linears = {m for m in model.modules() if hasattr(m, "out_features")}
    assert all(m in quantized or isinstance(m, DenseLinear) for m in linears)
    comes_back(model, tmp_path / "saved")

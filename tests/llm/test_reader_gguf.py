import numpy
import pytest
import torch
import transformers
from gguf_files import BF16, F16, F32, IQ4_NL, Q4_0, Q5_0, Q6_K, Q8_0, blocks, floats, write
from models import CountOperators

from llmrt import llm
from llmrt.llm.checkpoints.ggml_blocks import canonical_blocks
from llmrt.llm.checkpoints.gguf import load, read_model
from llmrt.llm.linear import CanonicalLinear
from llmrt.llm.quantized import quantized_linears
from llmrt.ops.formats import dequantize

gguf = pytest.importorskip("gguf")

SIZES = {"hidden": 64, "inner": 96, "heads": 4, "kv": 2, "vocab": 96, "layers": 2}
NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
}  # fmt: skip


def in_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows as GGUF keeps those of query and key in this family: the two halves of a head in turn."""
    rows = weight.unflatten(0, (heads, 2, -1))
    return rows.transpose(1, 2).flatten(0, 2)


def stored(kind: int, shape: tuple[int, ...]) -> tuple[tuple[int, tuple[int, ...], bytes], torch.Tensor]:
    """Return a tensor for `write` and its values."""
    if kind == Q6_K:
        data = gguf.quants.quantize(torch.randn(shape).numpy(), gguf.GGMLQuantizationType.Q8_0)  # any bytes will do
        data = numpy.resize(data.reshape(-1), shape[0] * shape[1] // 256 * 210).reshape(shape[0], -1)
        scales = data.reshape(-1, 210)[:, 208:]
        scales[:] = numpy.frombuffer(numpy.float16(0.001).tobytes(), dtype=numpy.uint8)
        return (kind, shape, data.tobytes()), torch.from_numpy(
            gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q6_K)
        )
    if kind in (F32, F16, BF16):
        values = (1 + 0.1 * torch.randn(shape)).to({F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}[kind])
        return (kind, shape, floats(kind, values)), values.float()
    data, values = blocks(kind, *shape)
    return (kind, shape, data), values


def tiny_file(
    path, arch="llama", linears=Q4_0, embedding=F16, head=None, bias=False, norms=False, hidden=64, extra=None, parts=1
):
    """Write a tiny model; return the values of its parameters under transformers' names."""
    s = {**SIZES, "hidden": hidden}
    dim, tensors, state = s["hidden"] // s["heads"], {}, {}
    kv = dim * s["kv"]

    def add(name, kind, *shape):
        tensors[f"{name}.weight"], values = stored(kind, shape)
        layer, _, leaf = name.rpartition(".")
        full = f"model.layers.{layer[4:]}.{NAMES[leaf]}" if layer else NAMES[leaf]
        if arch == "llama" and leaf in ("attn_q", "attn_k"):  # the inverse of `in_pairs`
            order = in_pairs(torch.arange(shape[0]), shape[0] // dim)
            values = values[order.argsort()]
        state[f"{full}.weight"] = values
        if bias and leaf in ("attn_q", "attn_k", "attn_v"):
            values = torch.randn(shape[0])
            tensors[f"{name}.bias"], state[f"{full}.bias"] = (F32, (shape[0],), floats(F32, values)), values

    add("token_embd", embedding, s["vocab"], s["hidden"])
    for i in range(s["layers"]):
        shapes = {
            "q": (s["hidden"], s["hidden"]),
            "k": (kv, s["hidden"]),
            "v": (kv, s["hidden"]),
            "output": (s["hidden"], s["hidden"]),
        }
        for name, shape in shapes.items():
            add(f"blk.{i}.attn_{name}", linears, *shape)
        for name in ("gate", "up"):
            add(f"blk.{i}.ffn_{name}", linears, s["inner"], s["hidden"])
        add(f"blk.{i}.ffn_down", linears if s["inner"] % 256 == 0 or linears != Q6_K else Q8_0, s["hidden"], s["inner"])
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{i}.{name}", F32, s["hidden"])
        for name in ("attn_q_norm", "attn_k_norm") if norms else ():
            add(f"blk.{i}.{name}", F32, dim)
    add("output_norm", F32, s["hidden"])
    if head is not None:
        add("output", head, s["vocab"], s["hidden"])
    tensors |= extra or {}
    keys = {
        "context_length": 64, "embedding_length": s["hidden"], "block_count": s["layers"], "feed_forward_length": s["inner"],
        "attention.head_count": s["heads"], "attention.head_count_kv": s["kv"], "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 10000.0, "vocab_size": s["vocab"],
    }  # fmt: skip
    metadata = {"general.architecture": arch, **{f"{arch}.{key}": item for key, item in keys.items()}}
    if norms:
        metadata[f"{arch}.attention.key_length"] = dim
    metadata["tokenizer.ggml.tokens"] = [f"t{i}" for i in range(s["vocab"])]
    write(path, metadata, tensors)
    if parts > 1:
        write_parts(path, metadata, tensors, parts)
    return state


def write_parts(path, metadata, tensors, parts):
    """Write the file once more, split as llama.cpp does: only the first part has the metadata."""
    names = list(tensors)
    size = -(-len(names) // parts)
    for i in range(parts):
        own = {"split.no": i, "split.count": parts, "split.tensors.count": len(names)}
        part = path.with_name(f"{path.stem}-{i + 1:05d}-of-{parts:05d}.gguf")
        write(part, {**metadata, **own} if i == 0 else own, {n: tensors[n] for n in names[i * size : (i + 1) * size]})


def plain_model(model, state):
    """Return transformers' own model with the values of a file, float32."""
    config = transformers.CONFIG_MAPPING[model.config.model_type].from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    config.tie_word_embeddings, config._attn_implementation = False, "eager"
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = {"lm_head.weight": state["model.embed_tokens.weight"], **state}
    missing, unexpected = plain.load_state_dict(state, strict=False)
    assert not missing and not unexpected
    return plain


@pytest.mark.parametrize(
    "arch, options",
    [
        ("llama", {"linears": Q4_0, "embedding": Q8_0}),
        ("llama", {"linears": Q8_0, "head": Q8_0}),
        ("qwen2", {"linears": Q5_0, "embedding": Q4_0, "head": F16, "bias": True}),
        ("qwen3", {"linears": IQ4_NL, "embedding": BF16, "norms": True}),
        ("llama", {"linears": F16, "head": F16}),
    ],
)
def test_logits_are_those_of_the_dequantized_model(tmp_path, arch, options):
    state, quantized = tiny_file(tmp_path / "tiny.gguf", arch, **options), options["linears"] != F16
    options = {"dtype": torch.float32, "compute_dtype": "fp32"}
    model = llm.AutoModelForCausalLM.from_pretrained(tmp_path / "tiny.gguf", **options)
    ids = torch.arange(14).view(2, 7) + 3
    with CountOperators() as calls:
        logits = model(ids, use_cache=False).logits
    assert (calls["quant_linear"] > 0) == quantized
    plain = plain_model(model, state)
    rounded, exact = plain(ids).logits, plain.double()(ids).logits
    assert (logits - exact).abs().max() < 8 * (rounded - exact).abs().max()  # weights of up to 16 make much of rounding
    if calls["quant_linear"]:
        model.save_pretrained(tmp_path / "saved")
        again = llm.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", **options)
        assert torch.equal(again(ids, use_cache=False).logits, logits)
    assert model.generate(ids[:1], max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (1, 10)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_every_weight_is_exact(tmp_path, arch):
    state = tiny_file(tmp_path / "tiny.gguf", arch, bias=arch == "qwen2", embedding=Q8_0)
    model, inexact = read_model(tmp_path / "tiny.gguf", torch.float32)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, CanonicalLinear)}
    assert len(linears) == 15 and not inexact and linears["lm_head"].layout.weight_dtype == "int8"
    for name, module in linears.items():
        expected = state[f"{name.replace('lm_head', 'model.embed_tokens')}.weight"]
        assert torch.equal(dequantize(*module.canonical(), module.layout, module.in_features), expected), name
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[name]), name


def test_types_without_a_counterpart(tmp_path):
    state = tiny_file(tmp_path / "tiny.gguf", linears=Q6_K, embedding=Q6_K, hidden=256)
    with pytest.raises(ValueError, match=r"holds exactly \(12 Q6_K; exact: linears in Q4_0, Q8_0.*or strict=False"):
        load(tmp_path / "tiny.gguf", dtype=torch.float32, strict=True)
    with pytest.raises(
        ValueError, match=r"12 Q6_K.*pass dtype=torch.float32 to have them as ggml .*or a quantization_config"
    ):
        load(tmp_path / "tiny.gguf")
    with pytest.warns(UserWarning, match=r"12 Q6_K.*they stay floating point, torch.float32"):
        model = load(tmp_path / "tiny.gguf", dtype=torch.float32, compute_dtype="fp32")
    ids = torch.arange(7).view(1, 7)
    torch.testing.assert_close(model(ids).logits, plain_model(model, state)(ids).logits, rtol=1e-3, atol=1e-3)
    anew = llm.WeightOnlyQuantConfig(weight_dtype="int4", group_size=64)
    model = load(tmp_path / "tiny.gguf", quantization_config=anew)
    layouts = {linear.name.rpartition(".")[2]: str(linear.layout) for linear in quantized_linears(model)}
    assert layouts["down_proj"] == "int8_sym_g32_f16" and layouts["up_proj"] == "int4_sym_g64_bf16"


@pytest.mark.parametrize("kind", [Q4_0, Q5_0, Q8_0, IQ4_NL])
def test_blocks_are_those_of_the_package(kind):
    data, values = blocks(kind, 35, 96)
    rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(35, -1)
    numpy_kind = gguf.GGMLQuantizationType(kind)

    def dequantized(part):
        return torch.from_numpy(gguf.quants.dequantize(part.numpy(), numpy_kind)).clone()

    assert torch.equal(dequantized(rows), values)
    weight = canonical_blocks("w", numpy_kind.name, rows.view(35, 3, -1), dequantized)
    assert str(weight.layout) == f"int{4 if kind == Q4_0 else 8}_sym_g32_f16"
    assert torch.equal(dequantize(*weight.canonical, weight.layout, 96), values)


def test_stretched_rotations(tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_theta=10000.0, max_position_embeddings=64,
        rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 8192},
    )  # fmt: skip
    frequencies = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq
    plain = 10000.0 ** (-torch.arange(8) / 8)
    for factors in (plain / frequencies, 1 + torch.rand(8)):
        extra = {"rope_freqs.weight": (F32, (8,), floats(F32, factors))}
        tiny_file(tmp_path / "tiny.gguf", extra=extra)
        model, _ = read_model(tmp_path / "tiny.gguf", torch.float32)
        torch.testing.assert_close(model.model.rotary_emb.inv_freq, plain / factors, rtol=1e-5, atol=0)
        assert model.model.rotary_emb.attention_scaling == 1


def test_a_head_without_a_counterpart_stays_floating_point(tmp_path):
    """As llama.cpp writes its Q4_0 files."""
    tiny_file(tmp_path / "tiny.gguf", linears=Q4_0, head=Q6_K, hidden=256)
    with pytest.warns(UserWarning, match=r"\(1 Q6_K; .*they stay floating point, torch.bfloat16"):
        model = load(tmp_path / "tiny.gguf")
    assert model.lm_head.weight.dtype == torch.bfloat16 and len(list(quantized_linears(model))) == 14


@pytest.mark.parametrize("head", [None, Q8_0])
def test_split_files(tmp_path, head):
    """The second part has the head, and no metadata but that of the split; a tied model has none."""
    state = tiny_file(tmp_path / "whole.gguf", linears=Q8_0, head=head, parts=2)
    whole, _ = read_model(tmp_path / "whole.gguf", torch.float32)
    model, inexact = read_model(tmp_path / "whole-00001-of-00002.gguf", torch.float32)
    assert not inexact and model.config.tie_word_embeddings == whole.config.tie_word_embeddings == (head is None)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert torch.equal(model.model.embed_tokens.weight, state["model.embed_tokens.weight"])

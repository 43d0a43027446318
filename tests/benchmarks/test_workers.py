"""The peers' workers and files, and what installs them."""

import sys
from types import SimpleNamespace

import pytest
import torch


def started(load, monkeypatch, peer, *options):
    """Return (facts, function of a run) of a worker of the tiny shape, from the command line that a comparison gives it."""
    peers, fleet = load("peers.py"), load("fleet.py")
    load("workers/protocol.py")
    worker = load("workers/transformers_model.py")
    args = peers.parse(["--peers", peer, "--shape=tiny", "--group-size=32", "--threads=1", *options])
    monkeypatch.setattr(sys, "argv", fleet.command(args.peers[0], args, [args.workload])[1:])
    threads = torch.get_num_threads()
    try:
        return worker, *worker.load(worker.parse())
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("peer", "unit"), [("llmrt:int4-all", "int8"), ("linears:int8", "int8"), ("eager:fp32", "fp32")]
)
def test_transformers_workers(peer, unit, load, monkeypatch):
    _, facts, run = started(load, monkeypatch, peer)
    assert facts["unit"] == unit and facts["weight_bytes"] > 0
    for depth, batch, beams in ((4, 1, 1), (4, 1, 1), (0, 2, 2)):
        seen = run(prompt=6, new=3, depth=depth, batch=batch, beams=beams)
        assert seen["first_token_s"] > 0 and seen["decode_s"] > 0


def test_linears_leave_attention_to_transformers(load, monkeypatch):
    models = {}
    for kind in ("linears", "llmrt"):
        worker, _, _ = started(load, monkeypatch, kind)
        models[kind] = worker.optimized(worker.parse())
    assert models["linears"].config._attn_implementation == "sdpa" != models["llmrt"].config._attn_implementation
    assert all(not isinstance(m.model.layers[0].mlp.down_proj, torch.nn.Linear) for m in models.values())


def test_torch_int4_linear_reads_its_weight_as_documented(load):
    torch_int4 = load("workers/torch_int4.py")
    linear = torch.nn.Linear(64, 32, bias=True)
    quantized = torch_int4.TorchInt4Linear(linear, group_size=32)
    codes = torch.randint(16, (32, 64), dtype=torch.int32)
    quantized.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    expected = x.float() @ ((codes - 8) / (4.6 * 64**0.5)).T + linear.bias
    assert (quantized(x).float() - expected).abs().max() < 0.05 * expected.abs().max()
    with pytest.raises(ValueError, match="groups of 48"):
        torch_int4.TorchInt4Linear(linear, group_size=48)


def test_torchao_missing(load, tmp_path):
    torchao = load("workers/torchao_model.py")
    if "torchao" in sys.modules:
        pytest.skip("torchao is installed here")
    with pytest.raises(RuntimeError, match=r"install_peers\.py installs it"):
        torchao.quantize(torch.nn.Linear(32, 32), "int8", 32, tmp_path)


def test_model_dimensions(load):
    fleet = load("fleet.py")
    fields = fleet.model_fields("llama-3.2-1b")
    assert fields["head_dim"] == 64 and fields["rope_theta"] == 500000 and fields["tie_word_embeddings"] is True
    assert fleet.model_fields("demo")["hidden_size"] == 256
    with pytest.raises((ValueError, AttributeError)):
        fleet.model_fields("no-such")


def test_gguf_file_has_the_bytes_of_its_mixture(load, tmp_path):
    gguf = pytest.importorskip("gguf")
    fields = load("fleet.py").model_fields("llama-3.2-1b")
    writer = load("workers/gguf_file.py")
    fields |= {"num_hidden_layers": 8, "vocab_size": 256, "hidden_size": 256, "intermediate_size": 512}

    def sizes(mixture, **changes):
        writer.write(str(tmp_path / "x.gguf"), fields | changes, mixture)
        return {t.name: t.n_bytes for t in gguf.GGUFReader(str(tmp_path / "x.gguf")).tensors}

    plain, mixed = sizes("q4_0"), sizes("q4_k_m")
    assert plain["blk.0.ffn_down.weight"] == 256 * 512 * 18 // 32
    assert plain["token_embd.weight"] == 256 * 256 * 210 // 256 and "output.weight" not in plain
    down = [mixed[f"blk.{i}.ffn_down.weight"] * 256 // (256 * 512) for i in range(8)]
    assert down == [210 if i in (0, 3, 6, 7) else 144 for i in range(8)]
    untied = sizes("q8_0", tie_word_embeddings=False)
    assert untied["output.weight"] == untied["token_embd.weight"] == 256 * 256 * 34 // 32
    with pytest.raises(ValueError, match="blocks of 256"):
        sizes("q4_k_m", intermediate_size=320)


def test_random_blocks_have_the_deviation_of_a_weight(load):
    quants = pytest.importorskip("gguf.quants")
    numpy = pytest.importorskip("numpy")
    writer = load("workers/gguf_file.py")
    for draw, kind, _ in writer.FORMATS.values():
        weight = quants.dequantize(draw(64, 512, numpy.random.default_rng(0)), kind)
        assert weight.shape == (64, 512) and weight.std() == pytest.approx(512**-0.5, rel=0.05)


def test_openvino_graph_gives_the_same_logits_in_one_piece_and_in_many(load):
    pytest.importorskip("openvino")
    numpy = pytest.importorskip("numpy")
    fields = load("fleet.py").model_fields("tiny")
    load("workers/protocol.py")
    worker = load("workers/openvino_model.py")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f16", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    compiled = worker.ov.Core().compile_model(worker.Graph(fields, "int4", 32).build(), "CPU", settings)
    requests = worker.Requests(compiled, fields["vocab_size"])
    tokens = numpy.random.default_rng(0).integers(0, fields["vocab_size"], (2, 9))
    requests.rng = drawn = SimpleNamespace(integers=lambda low, high, shape, dtype: drawn.next.pop(0))

    def logits(depth, *pieces):
        drawn.next = list(pieces)
        requests.start(2, depth)
        requests.feed(2, depth, 9)
        assert not drawn.next
        return requests.request.get_output_tensor(0).data.copy()

    whole = logits(0, tokens)
    assert whole.shape == (2, 1, fields["vocab_size"]) and abs(whole).max() > 0.1
    for pieces in ((tokens[:, :4], tokens[:, 4:]), (tokens[:, 4:],)):  # the second finds the first four in the cache
        assert abs(logits(4, *pieces) - whole).max() < 0.01 * abs(whole).max()


def test_install_commands(load, capsys, tmp_path):
    install = load("install_peers.py")
    args = install.parse(["--into", str(tmp_path), "--peers", "openvino,torchao", "--pip=--quiet"])
    assert args.peers == ["openvino", "torchao"] and args.pip == ["--quiet"]
    ((openvino, _),) = install.commands("openvino", tmp_path / "openvino", args.pip)
    assert openvino[0] == str(tmp_path / "openvino" / "bin" / "python") and "--quiet" in openvino
    (tools, _), (build, environment) = install.commands("llama.cpp", tmp_path / "llama.cpp", [])
    assert "gguf" in tools and "--no-binary" in build and "GGML_NATIVE=ON" in environment["CMAKE_ARGS"]
    ((plain, _),) = install.commands("torchao", tmp_path / "torchao", [])
    assert plain[0] == sys.executable and str(tmp_path / "torchao") in plain
    with pytest.raises(SystemExit):
        install.parse(["--peers", "nobody"])
    assert "unknown nobody" in capsys.readouterr().err

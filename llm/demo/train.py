"""Train the demo model: a 5.8 M parameter Llama on the source files of the running interpreter's standard library.

    python -m llmrt.llm.demo.train OUT --seconds 4200

Two CPU cores need about 1.6 s per step of 6144 tokens; the packaged weights are from 70 minutes of that.
"""

import argparse
import math
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .corpus import library_files

LENGTH = 512  # tokens per window
BATCH = 12  # windows per step
PEAK_RATE = 1.5e-3
WARMUP_STEPS = 50
BOS, EOS = 0, 1


def read(path: Path) -> str:
    """Return a source file's text; bytes that are not UTF-8 are dropped."""
    return path.read_text(encoding="utf-8", errors="ignore")


def train_tokenizer(files: Iterable[Path], out: Path) -> Tokenizer:
    """Train and save a byte-level BPE of 4096 pieces with ``<s>`` 0 and ``</s>`` 1."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator((read(file) for file in files), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)
    return bpe


def encode(bpe: Tokenizer, files: Iterable[Path]) -> torch.Tensor:
    """Return the files' tokens in one row, each file between BOS and EOS."""
    return torch.tensor([token for file in files for token in (BOS, *bpe.encode(read(file)).ids, EOS)])


def random_windows(tokens: torch.Tensor, count: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Return `count` windows [count, LENGTH] that start anywhere."""
    starts = torch.randint(0, len(tokens) - LENGTH - 1, (count,), generator=generator)
    return torch.stack([tokens[start : start + LENGTH] for start in starts])


def new_model() -> LlamaForCausalLM:
    """Return the untrained model."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=1024,
            rope_theta=10000.0,
            tie_word_embeddings=True,
            bos_token_id=BOS,
            eos_token_id=EOS,
            rms_norm_eps=1e-5,
        )
    )


def held_out_loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Return the mean loss over 48 windows, the same ones at every call."""
    generator, total = torch.Generator().manual_seed(1), 0.0
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(6):
            batch = random_windows(tokens, 8, generator)
            total += model(batch, labels=batch).loss.item()
    return total / 6


def learning_rate(step: int, progress: float) -> float:
    """Return the rate: linear warm-up, then a cosine over `progress` 0..1 down to 5 % of the peak."""
    cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))
    return PEAK_RATE * min(1, (step + 1) / WARMUP_STEPS) * cosine


def train(model: LlamaForCausalLM, tokens: torch.Tensor, seconds: float) -> None:
    """Train for a time, not for a number of steps: the schedule follows the clock."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    start, step = time.monotonic(), 0
    while (elapsed := time.monotonic() - start) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, elapsed / seconds)
        batch = random_windows(tokens, BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            print(f"step {step}  {elapsed:.0f} s  loss {loss.item():.3f}", flush=True)


def main() -> None:
    """Train the tokenizer and the model, print the held-out perplexity, save both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=4200)
    args = parser.parse_args()
    training, held_out = library_files()
    bpe = train_tokenizer(training, args.out)
    torch.manual_seed(0)
    model = new_model()
    train(model, encode(bpe, training), args.seconds)
    print(f"held-out perplexity {math.exp(held_out_loss(model, encode(bpe, held_out))):.2f}")
    model.to(torch.bfloat16).save_pretrained(args.out)


if __name__ == "__main__":
    main()

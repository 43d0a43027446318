"""Which samples of an operator run where each costs a second: together they have every kind of argument that all samples have, and every
pair of kinds of which one decides how a kernel works."""

import inspect
import itertools
from collections.abc import Hashable, Iterator

import torch

from llmrt.ops import Layout, Operator
from llmrt.ops.operator import Sample
from llmrt.xpu.triton.compile_ahead import cover

#: Arguments that decide how a kernel works: every pair of a kind of theirs and one of another argument is kept.
DECIDING = {"quant_linear": ("compute",), "attention": ("rows of key",), "rope": ("interleaved",)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def kinds(op: Operator, sample: Sample) -> Iterator[tuple[str, Hashable]]:
    """Yield what a kernel may treat in another way, by argument."""
    bound = inspect.signature(op.reference).bind(*sample.args, **sample.kwargs)
    bound.apply_defaults()
    for name, value in bound.arguments.items():
        if isinstance(value, torch.Tensor) and value.dtype == torch.uint8:
            yield name, value.numel() == 0  # a packed weight: its layout says what it is
        elif isinstance(value, torch.Tensor):
            yield name, (value.dtype, value.is_contiguous(), value.numel() == 0)
            yield (
                f"{name} sizes",
                tuple("1" if n == 1 else "2^n" if power_of_two(n) else "odd" for n in value.shape[-1:]),
            )
        elif name == "layout":
            form = Layout.parse(value)
            yield from (("format", (form.weight_dtype, form.asymmetric)), ("group", form.group_size))
            yield "scales", form.scale_dtype
        elif isinstance(value, bool | str | None):
            yield name, value
        else:
            yield name, value > 0
    first = sample.args[0]
    if op.name == "attention":
        stored = sample.args[1].dtype
        yield "rows of key", ("query's" if stored == first.dtype else stored == torch.int8, first.shape[1] == 1)
    if first.dim() > 1:
        yield "rows", "1" if first.shape[:-1].numel() == 1 else "few" if first.shape[:-1].numel() <= 16 else "many"


def cost(sample: Sample) -> int:
    return sum(a.numel() for a in sample.args if isinstance(a, torch.Tensor))


def every_sample(op: Operator) -> list[Sample]:
    return [sample for dtype in DTYPES for sample in op.sample_inputs(dtype)]


def with_pairs(op: Operator, sample: Sample) -> set[Hashable]:
    found = set(kinds(op, sample))
    deciding = [kind for kind in found if kind[0] in DECIDING.get(op.name, ())]
    return found | set(itertools.product(deciding, found))


def covering(op: Operator) -> list[Sample]:
    """Return few samples, of all dtypes, that have every kind and deciding pair: the one with the most new ones first, and so on."""
    return cover([(sample, with_pairs(op, sample)) for sample in sorted(every_sample(op), key=cost)])

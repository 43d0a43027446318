"""The table of block sizes: for each kernel and class of shapes the default, the candidates of autotuning behind it, and the reason."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...ops.formats import Layout

#: Elements of a row that one program holds in registers: 1024 threads with 32 each.
LONGEST_ROW = 32768
#: Multiprocessors of an H100. With fewer programs than these some would idle, and a loop's latency would be all that counts; to get
#: there, work is shared by as many as keep four programs on each, which hide each other's.
PROCESSORS = 132
WANTED = 4 * PROCESSORS
#: Each of the programs that share inputs or cached tokens has at least as many, or the second kernel would cost more than it saves.
FEWEST_INPUTS, FEWEST_TOKENS, MOST_PARTS = 512, 256, 64


@dataclass(frozen=True)
class Blocks:
    """Block sizes of one launch.

    Args:
        sizes: the kernel's compile-time arguments that are block sizes, powers of two.
        warps: groups of 32 threads of one program.
        stages: depth of the pipeline of loads in its loop.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2


def power(n: int, least: int = 1) -> int:
    """Return the smallest power of two that is neither below n nor below `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def rows(width: int) -> tuple[Blocks, ...]:
    """Norms: a program holds whole rows, so that a row is read once; short rows share one, or most threads would idle."""
    block = power(width)
    warps = 4 if block <= 4096 else 8 if block <= 8192 else 16 if block <= 16384 else 32
    default = Blocks({"ROWS": max(1, 2048 // block), "BLOCK": block}, warps)
    one = Blocks({"ROWS": 1, "BLOCK": block}, max(1, min(16, block // 512)))
    return (default, one) if one != default else (default,)


def elements(width: int) -> tuple[Blocks, ...]:
    """Elementwise: 16 elements per thread keep enough loads in flight; short rows share a program."""
    block = power(width) if width <= 2048 else 2048
    return (
        Blocks({"ROWS": 2048 // block, "BLOCK": block}),
        Blocks({"ROWS": 1024 // block or 1, "BLOCK": min(block, 1024)}),
    )


def columns(width: int) -> tuple[Blocks, ...]:
    """Elements of one row: 1024 per program."""
    return (Blocks({"BLOCK": power(width) if width <= 1024 else 1024}),)


def heads(width: int) -> tuple[Blocks, ...]:
    """Heads of one or more tokens: 2048 elements per program, at least one head."""
    block = power(width)
    return tuple(Blocks({"ROWS": max(1, n // block), "BLOCK": block}) for n in (2048, 512, 4096))


def argmax(width: int) -> tuple[Blocks, ...]:
    """A long row (a vocabulary) is split among programs: one alone could not draw the memory's rate."""
    return (Blocks({"BLOCK": min(power(width), 4096)}),)


def chunks(count: int) -> tuple[Blocks, ...]:
    """The second step of argmax: one program per row."""
    return (Blocks({"BLOCK": power(count)}),)


def segments(segment: int) -> tuple[Blocks, ...]:
    """Rounding of activations to int8: 2048 elements of one row."""
    return tuple(Blocks({"SEGMENTS": n // segment}) for n in (2048, 1024, 4096))


def parts(programs: int, rows: int, inputs: int, bits: int) -> int:
    """Return how many parts of the inputs programs of their own sum up: 1 where there are enough programs without that.

    Writing and reading the sums, 8 bytes for each row and output, moves at most half as much as reading the weight.
    """
    if programs >= PROCESSORS:
        return 1
    return max(1, min(inputs // FEWEST_INPUTS, MOST_PARTS, WANTED // programs, inputs * bits // (128 * rows)))


def spans(programs: int, tokens: int) -> int:
    """Return how many spans of cached tokens programs of their own attend to: 1 where there are enough programs without that."""
    return 1 if programs >= PROCESSORS else max(1, min(tokens // FEWEST_TOKENS, MOST_PARTS, WANTED // programs))


def shared(size: int, parts: int, block: int = 1) -> tuple[int, int]:
    """Return how many parts `size` things have that are each the same multiple of `block` but the last, at most `parts`, and that size."""
    each = -(-size // (parts * block)) * block
    return -(-size // each), each


def joins(rows: int) -> tuple[Blocks, ...]:
    """The sum of parts: 2048 elements of a few rows, or of one."""
    few = min(power(rows), 16)
    return (Blocks({"BLOCK_M": few, "BLOCK_N": 64 if few > 1 else 128}, 4 if few > 1 else 1),)


def one_row_by_matrix_units(layout: Layout, int8: bool) -> bool:
    """Return whether one row takes the kernel of 16: of integers with integers, whose codes become bytes four at once and whose weight is
    read ahead, that takes 3 instructions per code where `vector` takes 5 (compute capability 9.0); other codes are made floats one by one.
    """
    return int8 and layout.format.integer


def vector(outputs: int, gated: bool) -> tuple[Blocks, ...]:
    """One row times a weight: bound by reading it. 32 outputs = one tile's width (both halves of a gated pair); a step reads 64 dwords of
    each output, 8 KB, so that 4 warps have 16 loads in flight; few outputs take half a tile per program to fill the device."""
    narrow = 16 if outputs <= 4096 and not gated else 32
    default = Blocks({"BLOCK_N": narrow, "DWORDS": 64}, 4, 3)
    wide = [Blocks({"BLOCK_N": 32, "DWORDS": n}, w, 3) for n, w in ((64, 4), (128, 8), (32, 2))]
    return (default, *(b for b in wide if b != default))


def matmul(m: int, n: int, sixteen_bits: bool, crowded: bool = False) -> tuple[Blocks, ...]:
    """Rows times a weight, or (m rows each) those of experts: 16 rows are the least that matrix units take; many rows share each
    dequantized tile, float32 (no matrix units) takes half of them, as its accumulators and operands are wider. Look-ups and finding the
    rows of an expert take registers too (crowded)."""
    sizes: tuple[tuple[int, int, int, int], ...]
    if m <= 16:
        sizes = ((16, 32, 2, 4), (16, 64, 4, 3), (16, 128, 4, 3)) if sixteen_bits else ((16, 32, 4, 3), (16, 32, 2, 3))
    elif m <= 64 or n <= 1024:
        sizes = ((32, 64, 4, 3), (64, 64, 4, 3), (64, 32, 4, 4))
    elif sixteen_bits and crowded:
        sizes = ((128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3))
    elif sixteen_bits:
        sizes = ((128, 128, 8, 3), (128, 64, 4, 3), (64, 128, 4, 3), (64, 64, 4, 4))
    else:
        sizes = ((64, 64, 4, 2), (64, 32, 4, 2), (32, 64, 4, 3))
    return tuple(Blocks({"BLOCK_M": bm, "BLOCK_N": bn}, w, s) for bm, bn, w, s in sizes)


def attention(rows: int, width: int, value_width: int, sixteen_bits: bool, plain: bool) -> tuple[Blocks, ...]:
    """Rows = query tokens x heads of a group: 16 for one token, as matrix units take no less; many rows reuse each key and value tile.

    Wide heads, float32 and options that keep more of each score in registers (not `plain`: masks, window, cap, slopes, int8) take fewer
    rows and more warps: these are the largest sizes that spill no registers on compute capability 9.0 (compile_ahead.py lists them).
    """
    d, dv = power(width, 16), power(value_width, 16)
    wide = max(d, dv) > 128
    sizes: tuple[tuple[int, int, int], ...]
    if rows <= 16:
        sizes = ((16, 64, 4), (16, 32, 8)) if sixteen_bits and plain and not wide else ((16, 32, 8), (16, 16, 4))
        if not sixteen_bits and not plain:
            sizes = ((16, 16, 8),)
    elif sixteen_bits and plain:
        sizes = ((64, 32, 8), (32, 32, 4)) if wide else ((128, 64, 8 if d > 64 else 4), (64, 64, 4), (128, 128, 8))
    elif sixteen_bits:
        sizes = ((32, 32, 8), (16, 32, 8)) if wide else ((64, 32, 8), (32, 32, 4), (128, 32, 8))
    elif plain:
        sizes = ((32, 32, 8), (32, 16, 8)) if wide else ((64, 32, 8), (32, 32, 4))
    else:
        sizes = ((16, 16, 8),)
    return tuple(Blocks({"BLOCK_M": m, "BLOCK_T": t, "BLOCK_D": d, "BLOCK_DV": dv}, w, 2) for m, t, w in sizes)


def merge(spans: int, value_width: int) -> tuple[Blocks, ...]:
    """The mean over spans: one program holds what all of them have for one head, so that it is read at once."""
    held, width = power(spans), power(value_width)
    return (Blocks({"SPANS": held, "BLOCK_DV": width}, max(1, min(8, held * width // 1024))),)

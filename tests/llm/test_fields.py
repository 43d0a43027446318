"""Bit fields of packed integers."""

from __future__ import annotations

import pytest
import torch
from integer_packers import pack_rows

from llmrt.llm.checkpoints.fields import canonical_codes, unpack_fields, words
from llmrt.ops.formats import split_codes


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 20, 32, 33, 96])
def test_fields_come_back(bits, count):
    fields = torch.randint(0, 1 << bits, (3, count))
    packed = pack_rows(fields, bits)
    assert packed.shape == (3, words(count, bits))
    assert torch.equal(unpack_fields(packed, bits, count), fields.to(torch.uint8))
    codes = canonical_codes(packed, bits, count)
    assert torch.equal(split_codes(codes, 4 if bits <= 4 else 8, count), fields.to(torch.uint8))
    if bits <= 4 and count % 2:
        assert int(codes[:, -1].max()) < 16


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.uint32])
def test_word_size_does_not_matter(dtype):
    fields = torch.randint(0, 16, (2, 24))
    assert torch.equal(unpack_fields(pack_rows(fields, 4, dtype), 4, 24), fields.to(torch.uint8))


def test_a_transposed_matrix_is_read_by_rows():
    fields = torch.randint(0, 8, (5, 32))
    stored = pack_rows(fields, 3).t().contiguous()
    assert stored.shape == (3, 5)
    assert torch.equal(unpack_fields(stored.t(), 3, 32), fields.to(torch.uint8))


@pytest.mark.parametrize("read", [unpack_fields, canonical_codes])
def test_short_rows_are_refused(read):
    with pytest.raises(ValueError, match=r"9 fields of 4 bits do not lie in \[2, 1\]"):
        read(torch.zeros(2, 1, dtype=torch.int32), 4, 9)

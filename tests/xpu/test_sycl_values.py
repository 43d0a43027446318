"""What SYCL kernels do with values that the host does not read: places, positions and rows outside of what there is."""

import pytest
import torch

from llmrt import ops
from llmrt.ops.formats import Layout, quantize
from llmrt.xpu import install
from llmrt.xpu.route import ROUTES, import_routes
from llmrt.xpu.sycl.attention import ENOUGH_GROUPS, rows_of_program, splits_of
from llmrt.xpu.sycl.toolchain import missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
import_routes()


@pytest.fixture(autouse=True)
def kernels():
    with install("cpu", "sycl", strict=True) as installed:
        yield installed


def test_places_outside_the_cache_are_not_written() -> None:
    caches = torch.zeros(2, 1, 2, 5, 8).unbind(0)
    key, value = torch.randn(2, 1, 3, 2, 8).unbind(0)
    ops.kv_append(*caches, key, value, 0, 1, torch.tensor([5, 2, -1]))
    for cache, new in zip(caches, (key, value), strict=True):
        assert torch.equal(cache[0, :, 2], new[0, 1])
        assert not cache[:, :, [0, 1, 3, 4]].any()


@pytest.mark.parametrize("held", [3, -1, 2**40])
def test_a_counter_stays_where_tokens_do_not_fit(held: int) -> None:
    caches, counter = torch.zeros(2, 1, 2, 5, 8).unbind(0), torch.tensor(held)
    ops.kv_append(*caches, *torch.randn(2, 1, 3, 2, 8).unbind(0), 0, counter=counter)
    assert int(counter) == held and not any(cache.any() for cache in caches)


def test_a_counter_advances_once_in_every_launch() -> None:
    caches, counter = torch.zeros(2, 8, 8, 90, 8).unbind(0), torch.tensor([0])
    for step in range(30):  # of 48 work-groups
        key, value = torch.randn(2, 8, 3, 8, 8).unbind(0)
        ops.kv_append(*caches, key, value, 0, counter=counter)
        assert counter.tolist() == [3 * step + 3]
        assert torch.equal(caches[0][:, :, 3 * step : 3 * step + 3], key.transpose(1, 2))


def test_a_position_outside_the_table_gives_nan() -> None:
    x, table = torch.randn(1, 3, 2, 8), torch.randn(2, 5, 2)
    query, key = ops.rope(x, x, *table, torch.tensor([[4, 5, -1]]), 4)
    for out in (query, key):
        assert out[0, 0].isfinite().all() and out[0, 1:, :, :4].isnan().all()
        assert torch.equal(out[..., 4:], x[..., 4:])


def test_an_entry_of_rows_outside_the_cache_gives_nan() -> None:
    query, cache = torch.randn(3, 1, 2, 16), torch.randn(2, 2, 20, 16)
    rows = torch.zeros(3, 20, dtype=torch.int32)
    rows[0, 7], rows[1, 19] = 2, -1
    out = ops.attention(query, cache, cache, 20, 0.25, rows=rows)
    assert out[:2].isnan().all() and out[2].isfinite().all()


@pytest.mark.parametrize("compute", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("group", [-1, 20, 32])
def test_rows_that_share_a_weight_do_not_mix(group: int, compute: str) -> None:
    layout = Layout("int4", True, group, torch.bfloat16)
    packed = ops.pack_weight(*quantize(torch.randn(50, 300), layout), str(layout), 300)
    x = (torch.randn(17, 301) * torch.logspace(-3, 3, 17)[:, None]).bfloat16()[:, 1:]  # not at whole words
    shared = ops.quant_linear(x, packed, None, None, str(layout), 50, compute)
    for i, row in enumerate(x.contiguous()):
        alone = ops.quant_linear(row, packed, None, None, str(layout), 50, compute)
        torch.testing.assert_close(shared[i], alone)


def test_heads_above_256_elements_are_refused() -> None:
    query, cache = torch.randn(1, 1, 2, 320), torch.randn(1, 2, 4, 320)
    reason = ROUTES["attention", "sycl"].refuses(query, cache, cache, 4, 0.1)
    assert reason == "query has heads of 320 elements; it takes up to 256"


def test_work_of_a_launch() -> None:
    assert [splits_of(8, length) for length in (1, 256, 257, 4096, 10**6)] == [1, 1, 2, 16, 32]
    assert splits_of(2 * ENOUGH_GROUPS, 10**6) == 1
    assert [rows_of_program(n, torch.bfloat16) for n in (1, 2, 4, 5, 100)] == [1, 4, 4, 8, 8]
    assert [rows_of_program(n, torch.int8) for n in (1, 8)] == [1, 4]

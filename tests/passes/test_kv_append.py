"""index_copy_ of keys and values becomes one kv_append, its counter included, only where nobody sees the difference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from llmrt.passes import RewriteReport, rewrite
from llmrt.passes.kv_append import APPENDS, NAME

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
B, Hk, C, D, Dv = 2, 3, 12, 8, 6
aten = torch.ops.aten
Call = Callable[..., Any]


pytestmark = pytest.mark.usefixtures("without_gradients")


def inputs(tokens: int = 4, dtype: torch.dtype = torch.float32, rows: int = B, capacity: int = C) -> list[Tensor]:
    """Return caches, a counter, new keys and values [B, Hk, S, D]: views, as a model makes them."""
    key_cache, value_cache = torch.zeros(rows, Hk, capacity, D), torch.zeros(rows, Hk, capacity, Dv)
    new = torch.randn(rows, tokens, Hk, D + Dv).transpose(1, 2).to(dtype)
    return [key_cache.to(dtype), value_cache.to(dtype), torch.tensor(3), new[..., :D], new[..., D:]]


def trace(function: Call, given: list[Tensor], mode: str = "fake") -> GraphModule:
    return make_fx(function, tracing_mode=mode, pre_dispatch=True)(*given)


def calls(gm: GraphModule, *targets: Any) -> int:
    return sum(node.target in targets for node in gm.graph.nodes)


def assert_equal(gm: Call, function: Call, given: list[Tensor]) -> None:
    copies = [x.clone() for x in given]
    torch.testing.assert_close(gm(*given), function(*copies), rtol=0, atol=0)
    torch.testing.assert_close(given, copies, rtol=0, atol=0)


def rewritten(function: Call, given: list[Tensor]) -> tuple[GraphModule, RewriteReport]:
    """Return the rewritten graph of a function, which gives the same and leaves its inputs the same."""
    gm = trace(function, given)
    report = rewrite(gm, APPENDS, strict=True)
    assert_equal(gm, function, given)
    return gm, report


def static(keys: Tensor, values: Tensor, count: Tensor, key: Tensor, value: Tensor) -> Any:
    count = count.to(key.device, torch.int64).contiguous()
    places = torch.arange(key.shape[-2]) + count
    count.add_(key.shape[-2])
    keys.index_copy_(2, places, key)
    values.index_copy_(-2, places, value)
    return keys, keys.sum(), (values * 2)[..., 1:], count + 1


def late(keys: Tensor, values: Tensor, count: Tensor, key: Tensor, value: Tensor) -> Any:
    places = count + torch.arange(0, key.shape[2], 1)
    updated = keys.index_copy_(2, places, key), values.index_copy_(2, places, value)
    count += key.shape[2]
    return updated


def first(count: Tensor, key: Tensor, value: Tensor) -> Any:
    places = torch.arange(key.shape[2]) + count
    count.add_(key.shape[2])
    keys, values = (torch.zeros(*key.shape[:2], C, width, dtype=key.dtype) for width in (D, Dv))
    return keys.index_copy_(2, places, key), values.index_copy_(2, places, value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("function", [static, late, first])
def test_the_counter_goes_with_the_tokens(function: Call, tokens: int, dtype: torch.dtype) -> None:
    gm, report = rewritten(function, inputs(tokens, dtype)[2 if function is first else 0 :])
    assert report.fired[NAME] == calls(gm, torch.ops.llmrt.kv_append.default) == 1 and not report.near_misses
    assert not calls(gm, aten.index_copy_.default, aten.add_.Tensor, aten.arange.default, aten.arange.start_step)


def test_tokens_that_come_before_their_heads_are_taken_as_they_are() -> None:
    def function(keys: Tensor, values: Tensor, count: Tensor, key: Tensor, value: Tensor) -> Any:
        return static(keys, values, count, key.transpose(1, 2), value.permute(0, 2, 1, 3))

    given = inputs()
    gm, report = rewritten(function, [*given[:3], *(x.transpose(1, 2) for x in given[3:])])
    assert report.fired[NAME] == 1 and not calls(gm, aten.permute.default)


@pytest.mark.parametrize("function", [static, late])
def test_one_graph_for_all_sizes(function: Call) -> None:
    gm = trace(function, inputs(), "symbolic")
    assert rewrite(gm, APPENDS, strict=True).fired[NAME] == 1 and not calls(gm, aten.add_.Tensor, aten.arange.default)
    for sizes in ({"tokens": 1}, {"tokens": 7, "rows": 4}, {"tokens": 2, "capacity": 5}):
        assert_equal(gm, function, inputs(**sizes))


def test_layers_and_steps() -> None:
    def function(counts: Tensor, *layers: Tensor) -> Any:
        for i, layer in enumerate((layers[:4], layers[4:], layers[:4])):
            static(layer[0], layer[1], counts[i % 2], layer[2], layer[3])

    one, two = inputs(), inputs()
    gm, report = rewritten(function, [torch.tensor([3, 1]), *one[:2], *one[3:], *two[:2], *two[3:]])
    assert report.fired[NAME] == 3 and not calls(gm, aten.add_.Tensor, aten.index_copy_.default)


def given_places(keys: Tensor, values: Tensor, places: Tensor, key: Tensor, value: Tensor) -> Any:
    for _ in range(2):
        keys.index_copy_(2, places, key)
        values.index_copy_(2, places, value)
    return keys.sum()


def test_positions_of_the_caller() -> None:
    given = inputs()
    given[2] = torch.tensor([5, 0, 3, 11])
    gm, report = rewritten(given_places, given)
    assert report.fired[NAME] == 2 and not calls(gm, aten.index_copy_.default)


def read_between(keys: Tensor, values: Tensor, count: Tensor, key: Tensor, value: Tensor) -> Any:
    places = torch.arange(key.shape[2]) + count
    count.add_(key.shape[2])
    seen = count.view(1) * 2
    keys.index_copy_(2, places, key)
    values.index_copy_(2, places, value)
    return seen


def written_between(keys: Tensor, values: Tensor, count: Tensor, key: Tensor, value: Tensor) -> Any:
    places = torch.arange(key.shape[2]) + count
    keys.index_copy_(2, places, key)
    values.index_copy_(2, places, value)
    count.mul_(2)
    count.add_(key.shape[2])


def other_step(keys: Tensor, values: Tensor, count: Tensor, key: Tensor, value: Tensor) -> Any:
    places = torch.arange(key.shape[2]) + count
    count.add_(key.shape[2] + 1)
    keys.index_copy_(2, places, key)
    values.index_copy_(2, places, value)


def never_advanced(keys: Tensor, values: Tensor, count: Tensor, key: Tensor, value: Tensor) -> Any:
    places = torch.arange(key.shape[2]) + count
    keys.index_copy_(2, places, key)
    values.index_copy_(2, places, value)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (read_between, "the counter is used between its change and the update of the caches"),
        (written_between, "mul_ does not add the number of new tokens to the counter"),
        (other_step, "add_ does not add the number of new tokens to the counter"),
        (never_advanced, "the counter is not advanced"),
    ],
)
def test_a_counter_that_others_see_stays(function: Call, reason: str) -> None:
    gm, report = rewritten(function, inputs())
    assert report.fired[NAME] == 1 and f"{NAME} did not fire (1 times): positions stay: {reason}" in str(report)
    assert calls(gm, aten.arange.default) == 1 and not calls(gm, aten.index_copy_.default)


def test_other_places_are_no_counter() -> None:
    def function(keys: Tensor, values: Tensor, count: Tensor, key: Tensor, value: Tensor) -> Any:
        places = torch.arange(1, key.shape[2] + 1) + count
        count.add_(key.shape[2])
        keys.index_copy_(2, places, key)
        values.index_copy_(2, places, value)

    gm, report = rewritten(function, inputs())
    assert report.fired[NAME] == 1 and calls(gm, aten.add_.Tensor) == 1


def used_early(keys: Tensor, values: Tensor, places: Tensor, key: Tensor, value: Tensor) -> Any:
    keys.index_copy_(2, places, key)
    seen = keys * 2
    values.index_copy_(2, places, value)
    return seen


def changed_early(keys: Tensor, values: Tensor, places: Tensor, key: Tensor, value: Tensor) -> Any:
    keys.index_copy_(2, places, key)
    key.mul_(2)
    values.index_copy_(2, places, value)


def alone(keys: Tensor, values: Tensor, places: Tensor, key: Tensor, value: Tensor) -> Any:
    keys.index_copy_(2, places, key)
    values.index_copy_(2, places + 1, value)


def one_memory(keys: Tensor, values: Tensor, places: Tensor, key: Tensor, value: Tensor) -> Any:
    keys[:1].index_copy_(2, places, key[:1])
    keys[1:].index_copy_(2, places, key[1:])


def strided(keys: Tensor, values: Tensor, places: Tensor, key: Tensor, value: Tensor) -> Any:
    keys.repeat(1, 1, 1, 2)[..., ::2].index_copy_(2, places, key)
    values.index_copy_(2, places, value)


def shorter(keys: Tensor, values: Tensor, places: Tensor, key: Tensor, value: Tensor) -> Any:
    keys.index_copy_(2, places, key)
    values[:, :, :9].index_copy_(2, places, value)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (used_early, "a cache is used before the other one is written"),
        (changed_early, "new tokens or positions are written to in between"),
        (alone, "no second cache is written at the same positions"),
        (one_memory, "no second cache is written at the same positions"),
        (strided, "the last dimension of a cache is not contiguous"),
        (shorter, r"the caches have shapes [2, 3, 12, 8] and [2, 3, 9, 6]"),
    ],
)
def test_near_misses(function: Call, reason: str) -> None:
    given = inputs()
    given[2] = torch.tensor([5, 0, 3, 8])
    gm, report = rewritten(function, given)
    assert report.fired[NAME] == 0 and calls(gm, aten.index_copy_.default) == 2
    assert reason in str(report)

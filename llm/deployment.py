"""Deployment mode: a model's forward runs as a captured graph of operators, without the Python of its modules.

The graph is captured when the first call of its kind comes (`captured_forward.Key`: one token or several, one row or several, padding,
beams). Everything that a graph does not cover, such as hidden states, a cache of transformers or training, runs the optimized
modules; results are the same.
"""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import devices
from ..passes.capture import quiet_modes
from . import attention
from .cache import KVCache
from .captured_forward import Call, CapturedForward, CaptureError, Key, Kinds, learn_kinds
from .model_state import ModelState, Snapshot
from .stand_in import StandIn

T = TypeVar("T")

#: Arguments that a graph takes.
_TAKEN = frozenset(("input_ids", "attention_mask", "position_ids", "past_key_values", "logits_to_keep"))
#: Arguments that must have their usual value, beside None.
_USUAL = {
    "use_cache": True, "return_dict": True, "output_attentions": False, "output_hidden_states": False, "labels": None,
    "inputs_embeds": None,
}  # fmt: skip
#: Graphs of one key, for sizes that the model's code treats differently; beyond, the modules run.
MOST_GRAPHS = 6


#: Rotations that choose their frequencies by looking at the positions.
_CHANGING_ROTATIONS = ("dynamic", "longrope")


def undeployable(model: Any) -> str | None:
    """Return why a model's forward cannot be captured, as far as its configuration tells; None if nothing speaks against it."""
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    for part in (rope, *(v for v in rope.values() if isinstance(v, dict))):
        if part.get("rope_type") in _CHANGING_ROTATIONS:
            return f"its rotation ({part['rope_type']}) changes with the length of the text"
    return None


def _one_of_each(t: Any, share: int) -> Any:
    """Return the rows that differ if each is there `share` times in a row, else None; a single row or no tensor is returned as it is."""
    if t is None or t.shape[0] == 1:
        return t
    groups = t.unflatten(0, (-1, share))
    return groups[:, 0].contiguous() if bool((groups == groups[:, :1]).all()) else None


class Deployment(StandIn):
    """Stands for a model's `forward`."""

    def __init__(self, model: Any, strict: bool = False) -> None:
        """Capture nothing yet.

        Args:
            model: optimized, with llmrt's attention.
            strict: raise instead of warning when a forward cannot be captured.
        """
        super().__init__(model, strict)
        self._strict = strict
        forward = inspect.signature(type(model).forward)
        self.__signature__ = forward.replace(parameters=list(forward.parameters.values())[1:])
        self.__name__, self.__doc__ = "forward", type(model).forward.__doc__
        self.__code__ = type(model).forward.__code__  # torch.export asks where the forward is written
        self._lock = threading.RLock()
        self._forget()

    def _forget(self) -> None:
        self._state: ModelState | None = None
        self._kinds: Kinds | None = None
        self._graphs: dict[Key, list[CapturedForward]] = {}
        self._reasons: dict[Key | None, str] = {}

    @property
    def graphs(self) -> list[CapturedForward]:
        """All graphs captured so far."""
        return [graph for graphs in self._graphs.values() for graph in graphs]

    def graph(self, wanted: Callable[[Key], bool]) -> CapturedForward | None:
        """Return the first graph whose key is wanted: ``model.forward.graph(lambda key: key.one_token)``; None if there is none."""
        return next((graphs[0] for key, graphs in self._graphs.items() if wanted(key)), None)

    @property
    def reasons(self) -> list[str]:
        """Why calls ran the modules although a graph was expected."""
        return list(dict.fromkeys(self._reasons.values()))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a graph if one covers the call, else the modules."""
        model = self.model
        if not torch.compiler.is_compiling() and self.is_usual(model, args, kwargs):
            out = self._deployed(model, args[0] if args else kwargs.get("input_ids"), kwargs)
            if out is not None:
                return out
        return type(model).forward(model, *args, **kwargs)

    @staticmethod
    def is_usual(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether the arguments and torch's state are those of inference with a `KVCache`."""
        if type(kwargs.get("past_key_values")) is not KVCache or len(args) > 1 or model.training:
            return False
        if torch.is_grad_enabled() or any(map(torch.is_autocast_enabled, devices.ALL)):
            return False
        if kwargs.get("use_cache") is None and not model.config.use_cache:
            return False
        for name, value in kwargs.items():
            if name not in _TAKEN and (name not in _USUAL or (value is not None and value is not _USUAL[name])):
                return False
        return True

    def _deployed(self, model: Any, ids: Any, kwargs: dict[str, Any]) -> Any:
        """Return the output of a graph, or None if none covers the call."""
        found = self.prepared(model, ids, kwargs)
        if found is None:
            return None
        call, graph = found
        try:
            tensors = graph.run(*call.inputs())
        except Exception as error:  # the modules, run over the same tokens, say better what is wrong
            out = type(model).forward(model, ids, **{k: v for k, v in kwargs.items() if k != "input_ids"})
            self._refuse(call.key, error)
            return out
        for layer in call.stored:
            layer.length += call.sizes[1]
        if call.share > 1:
            tensors = [t.repeat_interleave(call.share, 0) for t in tensors]
        return graph.output(tensors, call.cache)

    def prepared(self, model: Any, ids: Any, kwargs: dict[str, Any]) -> tuple[Call, CapturedForward] | None:
        """Return a usual call, with room for its tokens in the cache, and the graph that covers it; None if none does.

        Args:
            model: the one that this stands for.
            ids: int64 [B, S].
            kwargs: the other arguments of forward.

        Raises:
            ValueError: the cache does not fit.
        """
        cache = kwargs["past_key_values"]
        if type(ids) is not Tensor or ids.dim() != 2 or not ids.numel():
            return None
        start = cache.layers[0].length
        if not self._ready(model, thoroughly=start == 0 or ids.shape[1] > 1):
            return None
        call = self._call(cache, ids, kwargs)
        if call is None:
            return None
        graph = next((g for g in self._graphs.get(call.key, ()) if g.fits(*call.sizes)), None) or self._new(model, call)
        return None if graph is None else (call, graph)

    def _ready(self, model: Any, thoroughly: bool) -> bool:
        """Return whether graphs may be used; forget them if the model changed."""
        state = self._state
        if state is None or state.changed(thoroughly):
            with self._lock:
                self._forget()
                self._state = state = ModelState(model)
                self._learn(model)
                self._tell(model)
        return None not in self._reasons and not state.hooked()

    def _learn(self, model: Any) -> None:
        """Find out what the layers of the cache hold."""
        config = model.config
        if config._attn_implementation != attention.NAME:
            self._reasons[None] = "the attention implementation was changed"
        elif config.output_attentions or config.output_hidden_states or not config.return_dict:
            self._reasons[None] = "the configuration asks for other outputs"
        else:
            try:
                self._kinds = self._undisturbed(model, lambda: learn_kinds(model))
            except Exception as error:  # a foreign forward may raise anything
                self._refuse(None, error)

    @staticmethod
    def _undisturbed(model: Any, run: Callable[[], T]) -> T:
        """Return the result of running the model over fake tensors; raise if that changes the model, after undoing it."""
        snapshot = Snapshot(model)
        try:
            result = run()
        except BaseException:
            snapshot.restore()
            raise
        if changed := snapshot.restore():
            raise CaptureError(f"its forward changes {', '.join(changed[:3])}")
        return result

    def _call(self, cache: KVCache, ids: Tensor, kwargs: dict[str, Any]) -> Call | None:
        """Return the call with room for its tokens in the cache, or None if it is an unusual one.

        Raises:
            ValueError: the cache does not fit.
        """
        assert self._kinds is not None
        (batch, tokens), layers = ids.shape, cache.layers
        start, kinds, device = layers[0].length, self._kinds.kinds, self._kinds.device
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        keep = kwargs.get("logits_to_keep", 0)
        if type(keep) is not int or not (keep in (0, 1) or keep >= tokens) or len(layers) != len(kinds):
            return None  # models ask whether `keep` is an int, which a symbolic one is not
        if any(isinstance(t, Tensor) and t.device != device for t in (ids, mask, positions)):
            return None  # the modules say what is wrong
        if mask is not None:
            if type(mask) is not Tensor or mask.shape != (batch, start + tokens):
                return None
            mask = mask if mask.dtype == torch.bool else mask.to(torch.bool)
            mask = None if bool(mask.all()) else mask
        if positions is not None and (
            type(positions) is not Tensor or positions.dtype != torch.int64
            or positions.shape not in ((batch, tokens), (1, tokens))
        ):  # fmt: skip
            return None
        share = cache.rows.beams if start == 0 and batch % cache.rows.beams == 0 else 1
        if share > 1:
            given = ids, mask, positions
            ids, mask, positions = (_one_of_each(t, share) for t in given)
            if [t is None for t in (ids, mask, positions)] != [t is None for t in given]:
                return None  # beams of different prompts
        buffers = None
        for layer, kind, reader in zip(layers, kinds, self._kinds.readers, strict=True):
            if kind is None:
                continue
            if layer.length != start:
                return None
            layer.reserve((batch, *kind), tokens)
            layer.claim(reader)
            shape = layer.key_cache.shape
            buffers = buffers or (shape[0], shape[2])
            if buffers != (shape[0], shape[2]):
                return None
        return Call(ids, mask, positions, cache, share, keep == 1 and tokens > 1)

    def _new(self, model: Any, call: Call) -> CapturedForward | None:
        """Capture a graph for a call; None if that does not work."""
        assert self._kinds is not None
        if call.key in self._reasons:
            return None
        with self._lock:
            try:
                if len(self._graphs.get(call.key, ())) == MOST_GRAPHS:
                    raise CaptureError(f"{MOST_GRAPHS} graphs were captured for different sizes")
                kinds = self._kinds
                graph = self._undisturbed(model, lambda: CapturedForward(model, kinds, call))
                if not graph.fits(*call.sizes):
                    raise CaptureError(f"the graph does not hold for the call that it was captured from: {call.sizes}")
                with quiet_modes():
                    self._try(model, graph, call)
            except Exception as error:  # a foreign forward may raise anything
                self._refuse(call.key, error)
                return None
            self._graphs.setdefault(call.key, []).append(graph)
            self._tell(model)
            return graph

    def _try(self, model: Any, graph: CapturedForward, call: Call) -> None:
        """Raise CaptureError unless graph and modules agree on a few tokens like those of the call, over caches of their own."""
        key, batch = call.key, call.ids.shape[0]
        past, tokens = 2, 1 if key.one_token else 3
        known, device = model.get_input_embeddings().num_embeddings, call.ids.device
        ids = torch.randint(known, (batch, past + tokens), generator=torch.Generator().manual_seed(0)).to(device)
        mask = torch.ones_like(ids, dtype=torch.bool) if key.mask else None
        if mask is not None:
            mask[0, 0] = False
        positions = None
        if key.positions:
            positions = torch.arange(past + tokens, device=device).repeat(1 if key.positions == 1 else batch, 1)

        def part(start: int, end: int, cache: KVCache) -> dict[str, Any]:
            given = {
                "attention_mask": None if mask is None else mask[:, :end],
                "position_ids": None if positions is None else positions[:, start:end],
                "logits_to_keep": 1 if key.last else None,
            }
            return {**{k: v for k, v in given.items() if v is not None}, "past_key_values": cache, "use_cache": True}

        forward = type(model).forward
        cache = KVCache(model.config, past + tokens, call.sizes[-1], call.cache.kv_dtype)
        forward(model, ids[:, :past], **part(0, past, cache))
        if key.table:
            cache.reorder_cache(torch.arange(batch))
        ours, last = copy.deepcopy(cache), (past, past + tokens)
        trial = self._call(ours, ids[:, past:], part(*last, ours))
        if trial is None or trial.key != key or not graph.fits(*trial.sizes):
            return  # buffers of a resized batch, or sizes that the model's code treats differently
        got = graph.output(graph.run(*trial.inputs()), ours).logits.float()
        expected = forward(model, ids[:, past:], **part(*last, cache)).logits.float()
        if got.shape != expected.shape:
            raise CaptureError(f"its logits have shape {list(got.shape)} instead of {list(expected.shape)}")
        difference = float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())
        if not difference < (1e-3 if model.dtype == torch.float32 and not graph.quantized else 0.05):
            raise CaptureError(f"its logits differ by {difference:.1e} in a trial run")

    def _tell(self, model: Any) -> None:
        """Enter the graphs into the model's report, and what has none."""
        lines = [f"{key.describe()}: {g.nodes} calls" for key, graphs in self._graphs.items() for g in graphs]
        for key, reason in self._reasons.items():
            lines.append(f"{'all' if key is None else key.describe()}: modules run: {reason}")
        report = getattr(model, "optimization_report", None)
        if report is not None:
            report.graphs[:] = lines

    def _refuse(self, key: Key | None, error: Exception) -> None:
        """Note why a kind of call (None: any) runs the modules, and say so once."""
        first = next(iter(str(error).splitlines()), "")
        reason = first if isinstance(error, CaptureError) else f"{type(error).__name__}: {first}"
        message = f"llmrt: the forward could not run as a graph ({reason}); the optimized modules run instead"
        if self._strict:
            raise RuntimeError(message) from error
        if reason not in self._reasons.values():
            warnings.warn(message, stacklevel=2)
        self._reasons[key] = reason
        self._tell(self.model)

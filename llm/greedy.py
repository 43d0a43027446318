"""Greedy search without the Python of transformers' loop: what `generate` returns is the same, a token costs less.

Transformers' loop prepares arguments, copies the logits to float32 and asks for their largest, extends masks and positions and looks
at every criterion with tensor operators: about 1 ms per token beside a forward of 12 ms.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .. import ops
from .cache import KVCache
from .captured_forward import Call, CapturedForward
from .deployment import Deployment
from .stand_in import StandIn

#: Arguments of `generate` that the loop of this module gives up for.
_OTHER_WAYS = (
    "custom_generate", "assistant_model", "assistant_tokenizer", "assistant_early_exit", "prompt_lookup_num_tokens",
    "tokenizer", "synced_gpus", "penalty_alpha", "dola_layers", "constraints", "force_words_ids", "num_beam_groups",
)  # fmt: skip
#: Arguments of a forward that a step changes or repeats.
_STEPPED = frozenset(
    ("input_ids", "position_ids", "attention_mask", "past_key_values", "use_cache", "logits_to_keep", "return_dict")
)


class Generate(StandIn):
    """Stands for a model's `generate`: greedy search runs `GreedySearch`, all else is transformers'."""

    def __init__(self, model: Any) -> None:
        """Look like the method."""
        super().__init__(model)
        method = type(model).generate
        signature = inspect.signature(method)
        self.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])
        self.__name__, self.__doc__ = method.__name__, method.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate."""
        model = self.model
        if len(args) <= 1 and self._may_be_greedy(model, kwargs):
            kwargs["custom_generate"] = GreedySearch(kwargs.get("streamer"))
        return type(model).generate(model, *args, **kwargs)

    @staticmethod
    def _may_be_greedy(model: Any, kwargs: dict[str, Any]) -> bool:
        configs = [kwargs.get("generation_config"), model.generation_config]

        def setting(name: str) -> Any:
            values = [kwargs.get(name), *(getattr(c, name, None) for c in configs)]
            return next((value for value in values if value is not None), None)

        if any(setting(name) for name in _OTHER_WAYS) or setting("do_sample"):
            return False
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return False  # transformers may keep ranks in step
        return (setting("num_beams") or 1) == (setting("num_return_sequences") or 1) == 1


class GreedySearch:
    """The decoding loop of one call of `generate` that chooses greedily, in the form of its `custom_generate`."""

    def __init__(self, streamer: Any = None) -> None:
        """Args:
        streamer: as in `generate`, which hands it to no loop but its own.
        """
        self.streamer = streamer

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Return what `_sample`, the greedy loop of transformers' GenerationMixin, returns; run that where this one does not serve."""
        if not self._is_plain(model, logits_processor, generation_config, model_kwargs):
            return type(model)._sample(
                model,
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                streamer=self.streamer,
                **model_kwargs,
            )
        outputs = model._prefill(
            input_ids, generation_config, model_kwargs, is_first_iteration=not generation_config.is_assistant
        )
        text = Text(input_ids, stopping_criteria, generation_config._pad_token_tensor, self.streamer)
        tokens = ops.argmax(outputs.logits[:, -1:])
        cache = outputs.past_key_values
        steps = Steps(model, model_kwargs, outputs)
        del outputs  # the logits of a prompt may be large
        while text.append(tokens):
            tokens = ops.argmax(steps(tokens, text))
        if self.streamer is not None:
            self.streamer.end()
        sequences = text.ids.contiguous()
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=cache)

    @staticmethod
    def _is_plain(model: Any, logits_processor: Any, config: Any, kwargs: dict[str, Any]) -> bool:
        """Return whether only tokens, and maybe the cache, are asked for, from a model that runs as graphs."""
        details = config.output_scores, config.output_logits, config.output_attentions, config.output_hidden_states
        hooks = (
            model._forward_hooks, model._forward_pre_hooks,
            torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks,
        )  # fmt: skip
        return (
            not len(logits_processor)
            and not any(details)
            and type(kwargs.get("past_key_values")) is KVCache
            and kwargs.get("use_cache") is True
            and type(model.__dict__.get("forward")) is Deployment
            and not any(hooks)
            and model._compiled_call_impl is None
        )


class Text:
    """The sequences so far, and whether they are finished."""

    def __init__(self, ids: Tensor, criteria: Any, pad: Tensor | None, streamer: Any) -> None:
        """Args:
        ids: int64 [B, S], the prompt.
        criteria: transformers' `StoppingCriteriaList`.
        pad: the token that follows the end of a sequence.
        streamer: gets every token.
        """
        self._buffer, self._length, self._streamer, self._pad = ids, ids.shape[1], streamer, pad
        self._criteria, self._most = criteria, None
        self._ends: set[int] = set()
        self._others = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
        for criterion in criteria:
            if type(criterion) is EosTokenCriteria:
                self._ends.update(criterion.eos_token_id.tolist())
            elif type(criterion) is MaxLengthCriteria:
                self._most = min(criterion.max_length, self._most or criterion.max_length)
                if self._most > (criterion.max_position_embeddings or self._most):
                    self._others.append(criterion)  # it warns when the text gets there
        self._unfinished = torch.ones(ids.shape[0], dtype=torch.long, device=ids.device)
        self._pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)

    @property
    def ids(self) -> Tensor:
        """int64 [B, tokens so far]."""
        return self._buffer[:, : self._length]

    def append(self, tokens: Tensor) -> bool:
        """Take tokens [B, 1], in place of which finished sequences get the padding; return whether there is more to come."""
        one = tokens.shape[0] == 1
        if self._pads and not one:
            assert self._pad is not None
            tokens.copy_((tokens[:, 0] * self._unfinished + self._pad * (1 - self._unfinished))[:, None])
        if self._length == self._buffer.shape[1]:
            more = self._buffer.new_empty((tokens.shape[0], max(64, self._length)))
            self._buffer = torch.cat([self._buffer, more], 1)
        self._buffer[:, self._length :][:, :1] = tokens
        self._length += 1
        finished = self._one_finished(tokens) if one else self._all_finished()
        if self._streamer is not None:
            self._streamer.put(tokens[:, 0].cpu())
        return not finished

    def _one_finished(self, token: Tensor) -> bool:
        finished = self._most is not None and self._length >= self._most
        if not finished and self._ends:  # a GPU is waited for only if the value of the token matters
            finished = int(token) in self._ends
        return finished | any([bool(criterion(self.ids, None).all()) for criterion in self._others])

    def _all_finished(self) -> bool:
        self._unfinished = self._unfinished & ~self._criteria(self.ids, None)
        return bool(self._unfinished.max() == 0)


class Steps:
    """Forwards of one token per row, the graph and its arguments kept from step to step."""

    def __init__(self, model: Any, kwargs: dict[str, Any], outputs: Any) -> None:
        """Args:
        model: with a `Deployment` as forward.
        kwargs: of the model, as transformers' loop has them before the prompt.
        outputs: of the prompt.
        """
        self._model, self._deployment = model, model.__dict__["forward"]
        self._kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
        self._layers = self._kwargs["past_key_values"].layers
        self._inputs: dict[str, Any] | None = None
        self._positions: Tensor | None = None
        self._mask: Tensor | None = None
        self._graph: CapturedForward
        self._sizes: tuple[int, ...]
        self._arguments: list[Any]
        self._capacity = -1  # tokens that fit the buffers which `_arguments` has

    def __call__(self, tokens: Tensor, text: Text) -> Tensor:
        """Return logits [B, 1, V] of tokens [B, 1], the last ones of the text."""
        if self._inputs is None:
            return self._general(tokens, text)
        if self._positions is not None:
            self._positions += 1
        if self._mask is not None:
            self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=True)
        start = self._layers[0].length
        if start < self._capacity and self._graph.fits(*self._sizes[:2], start, *self._sizes[3:]):
            return self._run(tokens, start)
        return self._prepare_and_run(tokens)

    def _general(self, tokens: Tensor, text: Text) -> Tensor:
        """Run one step as transformers' loop does; know afterwards what the others need, unless it is something unusual."""
        model = self._model
        inputs = model.prepare_inputs_for_generation(text.ids, next_sequence_length=1, **self._kwargs)
        outputs = model(**inputs, return_dict=True)
        self._kwargs = model._update_model_kwargs_for_generation(outputs, self._kwargs)
        inputs = {key: value for key, value in inputs.items() if value is not None}
        if _STEPPED.issuperset(inputs) and inputs["past_key_values"].layers is self._layers:
            positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
            self._positions = None if positions is None else positions.clone()
            self._mask = None if mask is None else mask.to(torch.bool)
            self._inputs = {**inputs, "position_ids": self._positions}
        logits: Tensor = outputs.logits
        return logits[:, -1:]

    def _prepare_and_run(self, tokens: Tensor) -> Tensor:
        """Run one step by the graph that covers it and keep that for the steps after it, or as any other call of the model."""
        assert self._inputs is not None
        inputs = {**self._inputs, "input_ids": tokens, "attention_mask": self._mask}
        others = {key: value for key, value in inputs.items() if key != "input_ids"}
        found = None
        if self._deployment.is_usual(self._model, (tokens,), others):
            found = self._deployment.prepared(self._model, tokens, others)
        if found is None or not self._repeats(found[0]):
            return self._ordinary(tokens)
        call, self._graph = found
        self._sizes, self._stored, self._arguments = call.sizes, call.stored, call.inputs()
        self._logits, self._capacity = self._graph.place("logits"), call.sizes[4]
        return self._run(tokens, call.sizes[2])

    def _repeats(self, call: Call) -> bool:
        """Return whether the next call has the same arguments but for what a step changes."""
        return call.cache.rows.table is None and call.share == 1 and (call.mask is None) == (self._mask is None)

    def _run(self, tokens: Tensor, start: int) -> Tensor:
        arguments = self._arguments
        arguments[0], arguments[1] = tokens, start
        if self._mask is not None:
            arguments[2] = self._mask
        try:
            logits: Tensor = self._graph.run(*arguments)[self._logits]
        except Exception:  # the model, called as usual, deals with it
            self._capacity = -1
            return self._ordinary(tokens)
        for layer in self._stored:
            layer.length = start + 1
        return logits

    def _ordinary(self, tokens: Tensor) -> Tensor:
        inputs = {**(self._inputs or {}), "input_ids": tokens, "attention_mask": self._mask}
        logits: Tensor = self._model(**inputs).logits
        return logits[:, -1:]

"""Carries a plan out on a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import attention, trial
from .algorithms import Calibrated
from .cache_setup import CacheSetup
from .dense import DenseLinear
from .deployment import Deployment
from .experts import QuantExperts
from .greedy import Generate
from .huge_pages import converted, move_to_huge_pages
from .linear import LinearGroup, QuantLinear, SiblingLinear
from .memory import FilePages, return_free_memory
from .mlp import GatedMLP, QuantGatedMLP
from .norm import convert_norm
from .plan import Plan, Step, settle_attention
from .positions import with_limit
from .rope import with_rotation
from .weight_checks import weights_of

#: Matrices up to this size are aligned: routers, and heads of small models.
ALIGNED_BYTES = 4 << 20


class Converter:
    """Applies steps in order and can take back those that freed nothing.

    Args:
        model: changed in place.
        plan: what to do.
        dtype: of the parameters that stay floating point, or None.
        keep: whether replaced weights belong to another model too, so that everything can be taken back.
        deploy: run the model as captured graphs where it fits; see llm/deployment.py.
        strict: what `Deployment` shall do when it cannot.
        calibrated: results of an algorithm, to be taken instead of the model's own weights.
    """

    def __init__(
        self,
        model: Any,
        plan: Plan,
        dtype: torch.dtype | None,
        keep: bool,
        deploy: bool = False,
        strict: bool = False,
        calibrated: Calibrated | None = None,
    ) -> None:
        """Remember what to change."""
        self.calibrated = calibrated or Calibrated()
        self.model, self.plan, self.dtype, self.keep = model, plan, dtype, keep
        self.pages = FilePages(model)
        self.deploy, self.strict = deploy, strict
        self.undo: list[Callable[[], None]] = []
        self.freed: list[str] = []

    def run(self) -> None:
        """Carry the plan out.

        Raises:
            RuntimeError: something failed. A model converted in place is as it was, unless weights were freed already (out of memory
                while quantizing or converting): then it is marked unusable, and the message says so.
        """
        try:
            self._parameters()
            for step in self.plan.steps:
                if not step.schemes:
                    getattr(self, f"_{step.kind}")(step)
            self._quantize([s for s in self.plan.steps if s.schemes])
            self._untie()
            self._dtype()
            self._align()
            move_to_huge_pages(m.weight for m in self.model.modules() if isinstance(m, DenseLinear))
            self._attention()
            self._deployment()
        except BaseException as error:
            if self.freed and not self.keep:
                self._refuse(error)
            for action in reversed(self.undo):
                action()
            raise
        if self.plan.quantization is not None:
            return_free_memory()

    def _parameters(self) -> None:
        """Set parameters that an algorithm folded scales into."""
        for name, value in self.calibrated.parameters.items():
            owner, _, key = name.rpartition(".")
            held = self.model.get_submodule(owner)._parameters
            old = held[key]
            assert old is not None
            held[key] = nn.Parameter(value, old.requires_grad)
            self.undo.append(lambda held=held, key=key, old=old: held.__setitem__(key, old))  # type: ignore[misc]

    def _source(self, name: str) -> Any:
        """Return a linear as the algorithm left it, or the model's own."""
        return self.calibrated.linears.pop(name, None) or self.model.get_submodule(name)

    def _quantize(self, steps: list[Step]) -> None:
        """Take one weight after the other: the next is read from its file while this one is packed and let go."""
        for index, step in enumerate(steps):
            for following in steps[index + 1 : index + 2]:
                self.pages.read_ahead(weights_of(self.model, following))
            getattr(self, f"_{step.kind}")(step)
            if not self.keep:
                self.freed += step.names
                self.undo.clear()
                return_free_memory()
            self.pages.release()

    def _refuse(self, error: BaseException) -> None:
        message = (
            f"optimize(inplace=True) failed ({error!r}) after {len(self.freed)} weights were converted and their old values "
            "freed; this model object is unusable, load it again (inplace=False keeps the given model whole)"
        )

        def forward(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(message)

        self.model.forward = forward
        raise RuntimeError(message) from error

    def _set(self, name: str, new: nn.Module) -> None:
        old = self.model.get_submodule(name)
        new.training = old.training
        self.model.set_submodule(name, new)
        if self.keep or not self._quantizes(new):
            self.undo.append(lambda: self.model.set_submodule(name, old))

    @staticmethod
    def _quantizes(module: nn.Module) -> bool:
        return isinstance(module, QuantLinear | SiblingLinear | QuantGatedMLP | QuantExperts)

    def _norm(self, step: Step) -> None:
        name = step.names[0]
        self._set(name, convert_norm(self.model.get_submodule(name), step.offset))

    def _rope(self, step: Step) -> None:
        module = self.model.get_submodule(step.names[0])
        old = type(module)
        module.__class__ = with_rotation(old, step.function, step.style)
        self.undo.append(lambda: setattr(module, "__class__", old))

    def _positions(self, step: Step) -> None:
        module = self.model.get_submodule(step.names[0])
        old = type(module)
        module.__class__ = with_limit(old)
        self.undo.append(lambda: setattr(module, "__class__", old))

    def _gated(self, step: Step) -> None:
        owner, *names = step.names
        linears = {name.rpartition(".")[2]: self._source(name) for name in names}
        if not step.schemes:
            self._set(owner, GatedMLP(linears, step.activation))
            return
        down = QuantLinear.from_linear(linears[names[-1].rpartition(".")[2]], step.schemes[-1])
        new = QuantGatedMLP.from_linears(linears, step.activation, step.schemes[0], down)
        self._set(owner, new)

    def _experts(self, step: Step) -> None:
        name = step.names[0]
        self._set(name, QuantExperts.from_experts(self.model.get_submodule(name), step.schemes, step.activation))

    def _fold(self, step: Step) -> None:
        _, linear, activation = step.names
        source = self._source(linear)
        self._set(linear, QuantLinear.from_linear(source, step.schemes[0], step.activation))
        self._set(activation, nn.Identity())

    def _group(self, step: Step) -> None:
        group = LinearGroup.from_linears([self._source(n) for n in step.names], step.schemes[0])
        for index, name in enumerate(step.names):
            self._set(name, SiblingLinear(group, index))

    def _linear(self, step: Step) -> None:
        name = step.names[0]
        self._set(name, QuantLinear.from_linear(self._source(name), step.schemes[0]))

    def _dense(self, step: Step) -> None:
        module = self.model.get_submodule(step.names[0])
        old = type(module)
        module.__class__ = DenseLinear
        self.undo.append(lambda: setattr(module, "__class__", old))

    def _attention(self) -> None:
        model, plan = self.model, self.plan
        if plan.attention is None:
            settle_attention(plan, model, trial.attention_misfit(model))
        if plan.attention:
            before = model.config._attn_implementation
            self.undo.append(lambda: model.set_attn_implementation(before))
            model.set_attn_implementation(attention.NAME)
        if plan.cache:
            model._prepare_cache_for_generation = CacheSetup(model)
            self.undo.append(lambda: delattr(model, "_prepare_cache_for_generation"))

    def _deployment(self) -> None:
        model, plan = self.model, self.plan
        if self.deploy and not plan.cache:
            plan.report.add("", "forward", reason="needs llmrt's attention and cache")
        elif self.deploy:
            plan.report.add("", "forward", "graphs, captured from the first calls")
            model.forward = Deployment(model, self.strict)
            self.undo.append(lambda: delattr(model, "forward"))
            model.generate = Generate(model)
            self.undo.append(lambda: delattr(model, "generate"))

    def _untie(self) -> None:
        """A quantized head is no longer tied to the embedding: say so where transformers would tie it again."""
        head = self.model.get_output_embeddings()
        config = self.model.config
        if not isinstance(head, QuantLinear):
            return
        for part in (config, config.get_text_config(decoder=True)):
            if getattr(part, "tie_word_embeddings", False):
                part.tie_word_embeddings = False
                self.undo.append(lambda part=part: setattr(part, "tie_word_embeddings", True))  # type: ignore[misc]
        tied = getattr(self.model, "all_tied_weights_keys", None)
        if tied:
            self.model.all_tied_weights_keys = {}
            self.undo.append(lambda: setattr(self.model, "all_tied_weights_keys", tied))

    def _align(self) -> None:
        """Move small matrices that start anywhere in a mapped file to a multiple of 64 bytes.

        torch's products of few rows give other bits elsewhere, and routers decide by small differences: a saved model must choose the
        same experts when it is loaded.
        """
        done: dict[int, nn.Parameter] = {}
        for module in self.model.modules():
            for name, old in module._parameters.items():
                if old is None or old.dim() != 2 or old.nbytes > ALIGNED_BYTES or old.data_ptr() % 64 == 0:
                    continue
                if id(old) not in done:
                    done[id(old)] = nn.Parameter(old.detach().clone(), old.requires_grad)
                module._parameters[name] = done[id(old)]
                self.undo.append(lambda held=module._parameters, name=name, old=old: held.__setitem__(name, old))  # type: ignore[misc]

    def _dtype(self) -> None:
        """Convert parameters; buffers, which a model derives from its configuration (RoPE frequencies), stay as they are."""
        if self.dtype is None:
            return
        done: dict[int, nn.Parameter] = {}
        for module in self.model.modules():
            for name, old in module._parameters.items():
                if old is None or not old.is_floating_point() or old.dtype == self.dtype:
                    continue
                if not self.keep:  # one at a time: the old values are freed
                    self.freed.append(name)
                    old.data = converted(old.data, self.dtype)
                    self.pages.release()
                    continue
                if id(old) not in done:  # tied parameters stay tied
                    done[id(old)] = nn.Parameter(converted(old.detach(), self.dtype), old.requires_grad)
                module._parameters[name] = done[id(old)]
        for part in (self.model.config, self.model.config.get_text_config(decoder=True)):
            old = part.dtype
            part.dtype = self.dtype
            self.undo.append(lambda part=part, old=old: setattr(part, "dtype", old))  # type: ignore[misc]

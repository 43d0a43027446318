"""A conversation that keeps its key/value cache: every turn feeds the model new tokens only."""

from __future__ import annotations

from typing import Any

import torch

from .timing import GenerationTimings, generate_timed


class ChatSession:
    """Several rounds with one model.

    With a chat template the conversation is rendered by it. Where the template changes earlier turns (some drop a model's
    thinking), the cache is cropped to the longest common prefix. Without a template every message continues the text.

    Args:
        model: a transformers causal language model, optimized or not.
        tokenizer: its tokenizer.
        system: system message, for models with a chat template.
        options: arguments of `generate` (max_new_tokens, do_sample ...).

    Raises:
        ValueError: a system message without a chat template.
    """

    def __init__(self, model: Any, tokenizer: Any, system: str | None = None, **options: Any) -> None:
        """Start an empty conversation."""
        self.model = model
        self.tokenizer = tokenizer
        self.options = options
        self.uses_template = bool(getattr(tokenizer, "chat_template", None))
        if system is not None and not self.uses_template:
            raise ValueError("a system message needs a chat template, and this model's tokenizer has none")
        self.system = system
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self._messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self._text = ""  # what the template made of the conversation, the last answer included as it was generated
        self._tokens: list[int] = []
        self._cache: Any = None

    @property
    def cached_tokens(self) -> int:
        """Tokens that the cache holds: they are not fed again."""
        return 0 if self._cache is None else self._cache.get_seq_length()

    def prompt_tokens(self, message: str) -> list[int]:
        """Return the whole conversation's tokens if `message` came next."""
        return self._render(message)[1]

    def _render(self, message: str) -> tuple[str, list[int]]:
        """Return the conversation with `message` as text (only with a template) and as tokens."""
        if not self.uses_template:
            return "", [*self._tokens, *self._encode(message, add_special_tokens=not self._tokens)]
        messages = [*self._messages, {"role": "user", "content": message}]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        if self._tokens and text.startswith(self._text):
            # The tokens that the model chose are kept: encoding their text again may give others.
            return text, [*self._tokens, *self._encode(text[len(self._text) :])]
        return text, self._encode(text)

    def _encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def send(self, message: str, streamer: Any = None, **options: Any) -> tuple[str, GenerationTimings]:
        """Return the model's answer to a message, and what it cost.

        Args:
            message: the user's next message; not empty.
            streamer: as in `generate`.
            options: of `generate`, over those of the session.

        Raises:
            ValueError: the message is empty.
        """
        if not message:
            raise ValueError("the message is empty")
        text, tokens = self._render(message)
        self._keep_common_prefix(tokens)
        output, timings = generate_timed(
            self.model,
            torch.tensor([tokens], device=self.model.device),
            past_key_values=self._cache,
            streamer=streamer,
            return_dict_in_generate=True,
            **{**self.options, **options},
        )
        self._cache = output.past_key_values
        self._tokens = output.sequences[0].tolist()
        answer = self.tokenizer.decode(self._tokens[len(tokens) :], skip_special_tokens=True)
        self._text = text + self.tokenizer.decode(self._tokens[len(tokens) :])
        self._messages += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
        return answer, timings

    def _keep_common_prefix(self, tokens: list[int]) -> None:
        """Crop the cache to what the conversation still starts with, leaving at least one token to feed."""
        held = self._tokens[: self.cached_tokens]
        limit = min(len(held), len(tokens) - 1)
        common = next((i for i in range(limit) if held[i] != tokens[i]), limit)
        if common == len(held):
            return
        if common and getattr(self._cache, "is_croppable", False):
            self._cache.crop(common - len(held))
        else:
            self._cache = None

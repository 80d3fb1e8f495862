"""Texts a model makes while it is trained: when, from what, and what one of them is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """A text the model has made behind a prompt. ended: by what, see `train.generation.text.Text`."""

    prompt: str
    text: str
    ended: str


@dataclass(frozen=True)
class SamplesConfig:
    """When the model of a run speaks, and about what, see `train.generation.live`."""

    every: int = 0
    """Steps from one set of texts to the next, with one after the last step; 0: none is made."""
    prompts: tuple[str, ...] = ("It is a truth",)
    """Beginnings of the texts."""
    tokens: int = 60
    """Tokens of each text at most, behind its prompt."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token, always."""
    top_p: float = 0.95
    """Of the likeliest tokens, as few are drawn from as have this probability together; 1: all."""

    def validate(self) -> None:
        """Raises ValueError, in one sentence, for a value that cannot be used."""
        key = "monitor.samples"
        if self.every < 0:
            raise ValueError(f"{key}.every={self.every} is negative: use 0 for never, or for instance 100")
        if not self.prompts:
            raise ValueError(f"{key}.prompts=[] holds none: give the beginning of a text, as in {key}.prompts=['It is a truth']")
        if self.tokens < 1:
            raise ValueError(f"{key}.tokens={self.tokens} must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"{key}.temperature={self.temperature} must be 0 (the likeliest token) or a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"{key}.top_p={self.top_p} must be above 0 and at most 1 (all tokens)")

    def due(self, step: int, last: int) -> bool:
        """Whether texts are made after step (from 1) of a run that ends with step `last`."""
        return self.every > 0 and (step % self.every == 0 or step == last)

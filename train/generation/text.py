"""A text as it grows: what of it is certain, and where it ends."""

from dataclasses import dataclass, field

from data.tokenizer import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@dataclass
class Text:
    """A prompt and what has come after it. ended: why, once it has."""

    tokenizer: Tokenizer
    prompt: str
    stops: tuple[str, ...]
    ids: list[int] = field(default_factory=list)
    more: str = ""
    ended: str = ""

    def add(self, token: int) -> str:
        """Adds a token; returns what is now certain of the text and was not before. The bytes of a character may be spread over tokens, and a
        stop text over several."""
        self.ids.append(token)
        if token == self.tokenizer.end_of_document:
            self.ended = "end of document"
        whole = self.tokenizer.decode(self.ids)
        found = [whole.index(stop) for stop in self.stops if stop in whole]
        if found:
            whole, self.ended = whole[: min(found)], "stop"
        elif not self.ended:
            whole = whole.rstrip(UNFINISHED)
            held = max((n for stop in self.stops for n in range(1, len(stop)) if whole.endswith(stop[:n])), default=0)
            whole = whole[: len(whole) - held]
        new = whole[len(self.more) :]
        self.more = max(whole, self.more, key=len)
        return new

    def finish(self) -> str:
        """What was held back, at the end."""
        if self.ended:
            return ""
        self.ended, whole = "length", self.tokenizer.decode(self.ids)
        new, self.more = whole[len(self.more) :], whole
        return new

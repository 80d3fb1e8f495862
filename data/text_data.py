"""The data of a run: batches of given samples, and the fixed validation windows."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.batch import Batch, Sample
from data.config import DataConfig, SourceConfig
from data.documents import DataError
from data.generated import Generated, is_generated, open_generated
from data.ngram import CountBaselines, count_baselines
from data.order import UNIT, Order, Phase
from data.source import Source, open_source, texts_key, texts_of
from data.tokenizer import Tokenizer, open_tokenizer
from data.validation import Validation, ValidationBatches

AnySource = Source | Generated

BASELINE_LIMIT = 20_000_000  # tokens a count model is fitted on at most; beyond that it takes long and says little


class TextData:
    """Sample i is a window of one source (see `data.order`): of a text `sequence_length` + 1 consecutive tokens.

    tokenizer, sources, sequence_length, seed: as opened. order: which window of which source a sample is.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, sources: Sequence[AnySource], sequence_length: int, seed: int):
        self.config, self.tokenizer, self.sources, self.sequence_length = config, tokenizer, tuple(sources), sequence_length
        self.seed = seed
        keys = [(source.path, source.text_key) for source in _sources(config)]
        phases = []
        for index, phase in enumerate(config.phases):
            weights = {(source.path, source.text_key): source.weight for source in phase.blend}
            samples = None if phase.tokens is None else -(-phase.tokens // sequence_length)
            phases.append(Phase(tuple(weights.get(key, 0.0) for key in keys), samples))
            total = sum(weights.values())
            for (path, _), weight in weights.items():
                if 0 < weight / total < 1 / UNIT:
                    raise DataError(
                        f"data.phases[{index}]: the weight {weight} of {path!r} is below 1 in {UNIT:,} of its blend: raise it, or set 0"
                    )
        windows = [source.windows(sequence_length, reset=config.reset_at_document) for source in sources]
        for place, (source, count) in enumerate(zip(sources, windows, strict=True)):
            if count < 1 and any(phase.weights[place] for phase in phases):
                raise DataError(
                    f"data source {source.path!r} has {source.tokens} training tokens, fewer than one sequence of "
                    f"train.sequence_length={sequence_length} and its last target: add text, or shorten sequences"
                )
        self.order = Order(phases, windows, seed)
        held = [source.validation for source in self.sources if source.validation is not None]
        self.validation = Validation(held, tokenizer.end_of_document, tokenizer.vocab_size, sequence_length)
        if config.validation_fraction > 0 and not held:
            raise DataError(
                f"data.validation_fraction={config.validation_fraction} holds out nothing of these sources, whose documents are too short: use "
                "data.validation=documents or a larger fraction, or set it to 0"
            )

    def batch(self, samples: Sequence[int], step: int) -> Batch:
        """The batch of these global sample indices. Raises DataError beyond the last phase, and for ids the tokenizer does not have."""
        length, reset = self.sequence_length, self.config.reset_at_document
        short = self.config.alternate_length if step % 2 else None
        rows = []
        for index in samples:
            place, window = self.order(index)
            rows.append(self.sources[place].sample(window, length, reset=reset))
            self._check_ids(self.sources[place], rows[-1], index)
        tokens, labels, counts, documents = (
            np.stack([getattr(row, name) for row in rows]) for name in ("tokens", "labels", "counts", "documents")
        )
        if short is not None:
            # As whole sequences, pieces know their last target: the mask is that of the documents.
            documents += np.arange(length, dtype=np.int32) // short
        return Batch(
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            loss_mask=torch.from_numpy(counts),
            documents=torch.from_numpy(documents),
            reset=reset or short is not None,
            sample=torch.tensor(samples, dtype=torch.int64),
            step=step,
        )

    def where(self, index: int) -> dict[str, Any]:
        """Where sample `index` comes from, for a person: its source, its window there, its first and last training document by number."""
        place, window = self.order(index)
        return {"sample": index, **self.sources[place].where(window, self.sequence_length)}

    def _check_ids(self, source: AnySource, row: Sample, index: int) -> None:
        ids = np.append(row.tokens, row.labels[-1])
        wrong = ids[(ids < 0) | (ids >= self.tokenizer.vocab_size)]
        if wrong.size:
            remedy = "use the tokenizer it was prepared with" if source.given else f"remove its tokens in data.cache={self.config.cache}"
            raise DataError(
                f"data source {source.path!r} holds id {wrong[0]} (in sample {index}), but data.tokenizer has ids 0 to "
                f"{self.tokenizer.vocab_size - 1}: {remedy}"
            )

    def validation_batches(self, batch_size: int) -> ValidationBatches:
        """The whole validation text in fixed windows, every token predicted once (see `data.validation`): a sequence of batches."""
        return ValidationBatches(self.validation, batch_size, self.config.reset_at_document)

    @property
    def texts(self) -> list[Source]:
        """The sources that are text."""
        return [source for source in self.sources if isinstance(source, Source)]

    @property
    def training_tokens(self) -> dict[str, int]:
        """Of each source that is text, end-of-document ids included."""
        return {source.path: len(source.train) for source in self.texts}

    @property
    def validation_tokens(self) -> int:
        return self.validation.tokens

    @cached_property
    def bytes_per_token(self) -> float | None:
        """Of the validation text: a loss in nats per token divided by it is in nats per byte. None without validation text."""
        size = 0
        for source in self.sources:
            if source.validation_bytes is not None:
                size += source.validation_bytes
            elif source.validation is not None:
                stream = source.validation
                size += sum(self.tokenizer.byte_length(stream.part(i)) for i in range(len(stream.lengths)))
        return size / self.validation.tokens if self.validation.tokens else None

    def count_baselines(self) -> CountBaselines | None:
        """Bigram and trigram count models of the training text, on the validation text; None without validation text, or where the training
        text is too long for a yardstick."""
        if not self.validation.tokens or sum(self.training_tokens.values()) > BASELINE_LIMIT:
            return None
        text = np.concatenate([source.train.read(0, len(source.train)).astype(np.int64) for source in self.texts])
        return count_baselines(text, self.validation.documents(), self.tokenizer.vocab_size, self.tokenizer.end_of_document)

    def describe(self) -> list[str]:
        """Lines for a person."""
        lines = []
        for index, phase in enumerate(self.config.phases):
            total = sum(source.weight for source in phase.blend)
            blend = ", ".join(f"{source.weight / total:.0%} {source.path}" for source in phase.blend)
            lines.append(f"data phase {index + 1}: {blend}" + (f", {phase.tokens:,} tokens" if phase.tokens else ""))
        sizes = ", ".join(f"{source.path} {'without end' if source.tokens is None else f'{source.tokens:,}'}" for source in self.sources)
        lines.append(f"data: training tokens {sizes}; validation tokens {self.validation_tokens:,} ({self.config.validation})")
        lines.append(
            f"tokenizer: {self.config.tokenizer.kind}, {self.tokenizer.vocab_size:,} ids, end of document {self.tokenizer.end_of_document}"
        )
        return lines


def _sources(config: DataConfig) -> list[SourceConfig]:
    """Every source of the run once, in the order in which phases first name them."""
    found: dict[tuple[str, str], SourceConfig] = {}
    for phase in config.phases:
        for source in phase.blend:
            found.setdefault((source.path, source.text_key), source)
    return list(found.values())


def open_data(config: DataConfig, *, sequence_length: int, seed: int) -> TextData:
    """Opens tokenizer and sources, tokenising what is not in the cache. Raises DataError (a ValueError) in one sentence."""
    config.validate()
    blend = tuple(source for source in config.phases[0].blend if not is_generated(source.path))
    key = texts_key(blend, config, seed) if config.tokenizer.kind == "bpe" else ""
    cache = Path(config.cache).expanduser()
    tokenizer = open_tokenizer(config.tokenizer, cache, lambda: texts_of(blend, config, seed), key)
    sources = [
        open_generated(source.path, tokenizer, seed) if is_generated(source.path) else open_source(config, source, tokenizer, seed)
        for source in _sources(config)
    ]
    return TextData(config, tokenizer, sources, sequence_length, seed)

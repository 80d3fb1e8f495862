"""The data of a run: batches of given samples, and the fixed validation windows."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data.batch import Batch
from data.config import DataConfig
from data.documents import DataError
from data.ngram import CountBaselines, count_baselines
from data.order import Order, Phase
from data.source import Source, open_source, texts_of
from data.tokenizer import Tokenizer, open_tokenizer

BASELINE_LIMIT = 50_000_000  # tokens a count model is fitted on at most; beyond that it says little and takes long


class TextData:
    """Sample i is `sequence_length` + 1 consecutive tokens of one source (see `data.order`)."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, sources: Sequence[Source], sequence_length: int, seed: int):
        self.config, self.tokenizer, self.sources, self.sequence_length = config, tokenizer, tuple(sources), sequence_length
        paths = [source.path for source in sources]
        windows = [(len(source.train.tokens) - 1) // sequence_length for source in sources]
        for path, count in zip(paths, windows, strict=True):
            if count < 1:
                raise DataError(f"data source {path!r} is shorter than one sequence of train.sequence_length={sequence_length} tokens: add text")
        phases = []
        for phase in config.phases:
            weights = {source.path: source.weight for source in phase.blend}
            samples = None if phase.tokens is None else -(-phase.tokens // sequence_length)
            phases.append(Phase(tuple(weights.get(path, 0.0) for path in paths), samples))
        self.order = Order(phases, windows, paths, seed)

    def batch(self, samples: Sequence[int], step: int) -> Batch:
        """The batch of these global sample indices."""
        rows = np.empty((len(samples), self.sequence_length + 1), dtype=np.int64)
        for row, index in enumerate(samples):
            source, window = self.order(index)
            start = window * self.sequence_length
            rows[row] = self.sources[source].train.tokens[start : start + self.sequence_length + 1]
        return self._batch(rows, np.asarray(samples, dtype=np.int64), step, np.ones((len(rows), self.sequence_length), dtype=bool))

    def _batch(self, rows: np.ndarray, samples: np.ndarray, step: int, valid: np.ndarray) -> Batch:
        documents = np.zeros(rows.shape, dtype=np.int32)
        if self.config.reset_at_document:
            # The end-of-document token belongs to the document it ends.
            documents[:, 1:] = np.cumsum(rows[:, :-1] == self.tokenizer.end_of_document, axis=1)
            valid = valid & (documents[:, 1:] == documents[:, :-1])
        return Batch(
            tokens=torch.from_numpy(rows[:, :-1].copy()),
            labels=torch.from_numpy(rows[:, 1:].copy()),
            loss_mask=torch.from_numpy(valid),
            documents=torch.from_numpy(documents[:, :-1].copy()),
            reset=self.config.reset_at_document,
            sample=torch.from_numpy(samples),
            step=step,
        )

    def _validation_documents(self) -> list[np.ndarray]:
        result = []
        for source in self.sources:
            if source.validation is not None:
                result += [np.asarray(source.validation.document(i), dtype=np.int64) for i in range(len(source.validation.lengths))]
        return result

    def validation_batches(self, batch_size: int) -> list[Batch]:
        """Fixed windows over the whole validation text: every document is cut by itself, every token is predicted exactly once (the first
        after an end-of-document token), the rest of a last window is masked. The last batch is filled up with masked rows."""
        length, end = self.sequence_length, self.tokenizer.end_of_document
        rows, valid = [], []
        for document in self._validation_documents():
            stream = np.concatenate(([end], document))
            for start in range(0, len(document), length):
                piece = stream[start : start + length + 1]
                row = np.full(length + 1, end, dtype=np.int64)
                row[: len(piece)] = piece
                rows.append(row)
                valid.append(np.arange(length) < len(piece) - 1)
        batches = []
        for start in range(0, len(rows), batch_size):
            block, mask = rows[start : start + batch_size], valid[start : start + batch_size]
            missing = batch_size - len(block)
            block += [np.full(length + 1, end, dtype=np.int64)] * missing
            mask += [np.zeros(length, dtype=bool)] * missing
            batch = self._batch(np.stack(block), np.arange(start, start + batch_size), 0, np.stack(mask))
            batches.append(batch)
        return batches

    @property
    def validation_tokens(self) -> int:
        return sum(len(document) for document in self._validation_documents())

    @property
    def bytes_per_token(self) -> float | None:
        """Of the validation text; None where the text is not known."""
        sizes = [source.validation_bytes for source in self.sources if source.validation is not None]
        if not sizes or any(size is None for size in sizes):
            return None
        return sum(size for size in sizes if size is not None) / self.validation_tokens

    def count_baselines(self) -> CountBaselines | None:
        """Bigram and trigram count models of the training text, on the validation text; None where they make no sense (no validation text, a
        large vocabulary, too much text)."""
        documents = self._validation_documents()
        train = sum(len(source.train.tokens) for source in self.sources)
        if not documents or train > BASELINE_LIMIT or self.tokenizer.vocab_size > 1024:
            return None
        text = np.concatenate([np.asarray(source.train.tokens) for source in self.sources])
        return count_baselines(text, documents, self.tokenizer.vocab_size, self.tokenizer.end_of_document)

    def describe(self) -> list[str]:
        """Lines for a person."""
        lines = []
        for index, phase in enumerate(self.config.phases):
            total = sum(source.weight for source in phase.blend)
            blend = ", ".join(f"{source.weight / total:.0%} {source.path}" for source in phase.blend)
            lines.append(f"data phase {index + 1}: {blend}" + (f", {phase.tokens:,} tokens" if phase.tokens else ""))
        train = sum(len(source.train.tokens) for source in self.sources)
        lines.append(f"data: {train:,} training and {self.validation_tokens:,} validation tokens ({self.config.validation})")
        return lines


def open_data(config: DataConfig, *, sequence_length: int, seed: int) -> TextData:
    """Opens tokenizer and sources, tokenising what is not in the cache. Raises DataError (a ValueError) in one sentence."""
    entries = {source.path: source for phase in config.phases for source in phase.blend}
    tokenizer = open_tokenizer(
        config.tokenizer, texts_of(config.phases[0].blend, config, seed), Path(config.cache).expanduser()
    )
    sources = [open_source(config, source, tokenizer, seed) for source in entries.values()]
    return TextData(config, tokenizer, sources, sequence_length, seed)

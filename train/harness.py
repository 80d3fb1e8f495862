"""Tasks of EleutherAI's lm-evaluation-harness (the package lm_eval, in the extra `eval`) on a checkpoint.

The harness asks three things of a model: how likely a continuation is behind a context, how likely a whole text is, and what it goes on to say.
Texts that are longer than `max_length` lose their beginning, as in the harness's own models.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval import simple_evaluate, utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from train.generation.sampling import Sampling
from train.generation.scores import score
from train.generation.speaker import Speaker
from train.generation.text import Text
from train.generation.texts import generate

Pair = tuple[Any, list[int], list[int]]
"""Something to know a request by, the tokens of its context and of its continuation."""


class HarnessModel(TemplateLM):
    """A checkpoint as the harness sees a model. batch: texts at a time. max_length: tokens of a text that are looked at."""

    def __init__(self, speaker: Speaker, batch: int, max_length: int) -> None:
        super().__init__()
        self.speaker, self.batch_size, self.max_length = speaker, batch, max_length
        self.max_gen_toks = min(256, max_length // 2)

    @property
    def eot_token_id(self) -> int:
        return self.speaker.tokenizer.end_of_document

    @property
    def tokenizer_name(self) -> str:
        return self.speaker.recipe.data.tokenizer.kind

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return [int(token) for token in self.speaker.tokenizer.encode(string)]

    def _loglikelihood_tokens(self, requests: list[Pair], **_: Any) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for numbers in self._batches([len(context) + len(more) for _, context, more in requests]):
            texts = [(requests[n][1] + requests[n][2])[-(self.max_length + 1) :] for n in numbers]
            for number, (chances, likeliest) in zip(numbers, score(self.speaker, texts), strict=True):
                count = min(len(requests[number][2]), len(chances))
                answers[number] = float(chances[-count:].double().sum()), bool(likeliest[-count:].all())
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for request in requests:
            windows = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            pairs: list[Pair] = [(None, *utils.make_disjoint_window(window)) for window in windows]
            totals.append(sum(chance for chance, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(number)
        for numbers in alike.values():
            contexts = {number: self.tok_encode(requests[number].args[0]) or [self.eot_token_id] for number in numbers}
            for some in self._batches([len(contexts[number]) for number in numbers]):
                chosen = [numbers[place] for place in some]
                for number, text in zip(chosen, self._continued([contexts[n] for n in chosen], requests[chosen[0]].args[1]), strict=True):
                    answers[number] = text
        return answers

    def _continued(self, contexts: Sequence[list[int]], given: Mapping[str, Any]) -> list[str]:
        keys = normalize_gen_kwargs(dict(given), self.max_gen_toks)
        limit = int(keys["max_gen_toks"])
        if limit >= self.max_length:
            raise ValueError(
                f"a task asks for {limit} tokens, but max_length={self.max_length} leaves none for its prompt: set max_length higher"
            )
        stops = tuple(stop for stop in keys["until"] if stop)
        sampling = Sampling(temperature=float(keys["temperature"]), top_p=float(keys.get("top_p", 1.0)))
        tokenizer = self.speaker.tokenizer
        texts = [Text(tokenizer, "", stops) for _ in contexts]
        prompts = [context[-(self.max_length - limit) :] for context in contexts]
        for chosen in generate(self.speaker, prompts, limit, sampling, end=tokenizer.end_of_document):
            for text, token in zip(texts, chosen, strict=True):
                if token is not None and not text.ended:
                    text.add(token)
            if all(text.ended for text in texts):
                break
        for text in texts:
            text.finish()
        return [text.more for text in texts]

    def _batches(self, sizes: Sequence[int]) -> Iterator[list[int]]:
        """Numbers of requests of about the same size, the largest first: what does not fit in memory shows at once."""
        order = sorted(range(len(sizes)), key=lambda number: -sizes[number])
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]


def run_tasks(
    speaker: Speaker, tasks: Sequence[str], *, include: str | None, batch: int, max_length: int, limit: int | None
) -> dict[str, Any]:
    """The harness's own results. include: a directory with task files (YAML). limit: requests of each task. Raises ValueError, in one sentence, for a
    task there is not."""
    manager = TaskManager(include_path=include)
    if missing := [task for task in tasks if not manager.match_tasks([task])]:
        where = f"in {include} or " if include else ""
        raise ValueError(
            f"tasks={missing[0]} is neither {where}among the tasks of lm_eval: look at lm-eval ls tasks, or give include=DIRECTORY"
        )
    results = simple_evaluate(
        HarnessModel(speaker, batch, max_length), tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=1000
    )
    assert results is not None  # on the first rank
    return dict(results)

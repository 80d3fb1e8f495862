"""The model that is being trained speaks, as it is after a step: in the formats of the run, on every rank alike.

Each rank makes every text, with the same draws, so experts may be spread over ranks; a rank must hold whole layers and whole sequences.
"""

from dataclasses import dataclass

import torch

from model.hybrid import HybridModel
from train.build import Run
from train.evaluation.acceptance import Acceptance
from train.evaluation.intervals import share_interval
from train.generation.acceptance import Acceptance as Rounds
from train.generation.sampling import Sampling
from train.generation.text import Text
from train.generation.texts import generate
from train.observe.sample_settings import Sample


@dataclass(frozen=True)
class Live:
    """See `train.generation.texts.Speaks`."""

    model: HybridModel
    step: int
    progress: float
    vocabulary: int


def live_samples(run: Run, step: int) -> list[Sample]:
    """The texts of `monitor.samples` after `step` steps. Collective; the model, and the random numbers of training, are left as they were."""
    config, tokenizer = run.recipe.monitor.samples, run.data.tokenizer
    sampling = Sampling(config.temperature, config.top_p, run.recipe.run.seed)
    (model,) = run.chunks
    texts = [Text(tokenizer, prompt, ()) for prompt in config.prompts]
    prompts = [tokenizer.encode(prompt).tolist() or [tokenizer.end_of_document] for prompt in config.prompts]
    run.engine.settle()
    # No text ends the others' loop: ranks that share experts take the same number of steps, whatever they would draw.
    for chosen in generate(Live(model, step, run.progress(step), tokenizer.vocab_size), prompts, config.tokens, sampling):
        for text, token in zip(texts, chosen, strict=True):
            if not text.ended and token is not None:
                text.add(token)
    run.context.weights.clear()  # quantised where nothing has a gradient, which those of training need
    for text in texts:
        text.finish()
    return [Sample(text.prompt, text.more, text.ended) for text in texts]


def accepted_lengths(run: Run, step: int, config: Acceptance) -> dict[str, float]:
    """accept/<domain>/length after `step` steps: tokens a pass gives when the model writes with the drafts of all its MTP depths, each token the
    likeliest, and the 95% interval over texts, _low and _high. Collective, as `live_samples`."""
    (model,), depth = run.chunks, run.mtp_depths
    speaker = Live(model, step, run.progress(step), run.data.tokenizer.vocab_size)
    run.engine.settle()
    metrics = {}
    for domain in config.domains:
        text = config.text(domain, run)
        prompts = [ids[: max(1, size // 2)].tolist() for ids, size in zip(text.ids, text.sizes.tolist(), strict=True)]
        counted = Rounds.none(len(prompts), depth)
        for _ in generate(speaker, prompts, config.length_tokens, Sampling(0.0), depth=depth, acceptance=counted):
            pass
        tokens = (counted.rounds * torch.arange(1, depth + 2)).sum(1).numpy()
        name = f"accept/{domain}/length"
        metrics[name], metrics[f"{name}_low"], metrics[f"{name}_high"] = share_interval(tokens, counted.rounds.sum(1).numpy())
    run.context.weights.clear()
    return metrics

"""Texts made by the model that is being trained, as it is after a step: in the formats of the run, on every rank alike.

Each rank makes every text, with the same draws, so experts may be spread over ranks; a rank must hold whole layers and whole sequences.
"""

from dataclasses import dataclass

from model.hybrid import HybridModel
from train.build import Run
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

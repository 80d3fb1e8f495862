"""The model of a checkpoint, on one rank, with its tokenizer: no data are opened and no optimizer is made."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer
from model.hybrid import HybridModel
from model.linear import Linear
from model.moe import Experts
from model.precision.multiplied import round_weights
from parallel import groups
from train.build import build_model
from train.checkpoint.checkpointer import load_weights
from train.checkpoint.reader import Checkpoint
from train.checkpoint.remote import RemotePath
from train.recipe.load import read_recipe
from train.recipe.tree import Recipe
from train.run_directory import run_dir_of, stored_recipe

PRECISIONS = ("fp32", "bf16")
WEIGHTS = ("stored", "rounded")
# What a recipe must have and no text depends on, for checkpoints that were imported: no run has trained them.
NO_RUN = {
    "train": {"steps": 1, "global_batch_size": 1, "sequence_length": 4096},
    "optimizer": {"learning_rate": 1.0},
    "data": {"tokenizer": {"kind": "file", "path": "tokenizer.json"}, "phases": [{"blend": [{"path": "none"}]}]},
}


@dataclass
class Speaker:
    """model: in evaluation mode. step, progress: of its training."""

    model: HybridModel
    tokenizer: Tokenizer
    recipe: Recipe
    step: int
    progress: float

    @property
    def vocabulary(self) -> int:
        return self.tokenizer.vocab_size


def open_speaker(checkpoint: Checkpoint, precision: str, weights: str = "stored") -> Speaker:
    """With every product in `precision` (fp32 or bf16). weights: as they are stored, or rounded to the number formats of the run at this step;
    `groups.shutdown` ends it. Raises ValueError, in one sentence, for what there is not or where something is missing.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision} is none of {', '.join(PRECISIONS)}, in which texts are made")
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights} is none of {', '.join(WEIGHTS)}")
    stored = stored_recipe(checkpoint)
    trained = read_recipe(on_one_rank(stored, stored.get("precision", {})), 1)
    recipe = read_recipe(on_one_rank(stored, {"compute": precision, "default": precision}), 1)
    tokenizer = run_tokenizer(recipe, run_dir_of(checkpoint) / "tokenizer")
    layout = groups.initialize(recipe.parallel, recipe.run.seed)
    _, (model,) = build_model(recipe, layout)
    # Checkpoints are read, and weights rounded, in the dtype they were trained in.
    same = trained.precision.compute == precision
    source = model if same else build_model(trained, layout)[1][0]
    load_weights(checkpoint, [source])
    progress = min(checkpoint.step / recipe.total_steps, 1.0)
    if weights == "rounded":
        sites = [part for module in source.modules() if isinstance(module, Linear | Experts) for part in module.weights()]
        if not round_weights([(site, weight, trained.policy.formats(site.name, progress)) for site, weight in sites], checkpoint.step):
            raise ValueError(
                f"weights=rounded changes nothing: no module of {checkpoint.path} rounds its weights in the forward pass at this step"
            )
    if not same:
        model.load_state_dict(source.state_dict())
    model.eval()
    return Speaker(model, tokenizer, recipe, checkpoint.step, progress)


def on_one_rank(values: Mapping[str, Any], precision: Any) -> dict[str, Any]:
    """A stored recipe for one rank, with another `precision` group; of an imported checkpoint too."""
    model = dict(values["model"])
    model["pattern"] = str(model["pattern"]).replace("|", "")  # pipeline stages
    return {**NO_RUN, **values, "model": model, "parallel": {}, "precision": precision}


def run_tokenizer(recipe: Recipe, directory: Path | RemotePath) -> Tokenizer:
    """The one a run has stored, in `directory`. Raises ValueError where it has none."""
    if recipe.data.tokenizer.kind == "bytes":
        return ByteTokenizer()
    try:
        config, stored = json.loads((directory / "tokenizer_config.json").read_text()), (directory / "tokenizer.json").read_bytes()
    except FileNotFoundError:
        raise ValueError(
            f"{directory} holds no tokenizer.json, and texts need the run's: copy it there from where the run trained"
        ) from None
    with tempfile.TemporaryDirectory() as here:  # the run may lie in a store
        (Path(here) / "tokenizer.json").write_bytes(stored)
        return FileTokenizer(Path(here) / "tokenizer.json", str(config["eos_token"]))

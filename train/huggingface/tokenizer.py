"""The run's tokenizer for others, so that `AutoTokenizer` gives the ids the model was trained on, and generation_config.json.

Here special tokens are ids nobody can type and nothing is added to a text: an exported tokenizer keeps to that, whatever the tokenizer.json of the
run would do by itself.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers

from train.checkpoint.remote import Location

FACTS = "facts.json"  # ours: see train.run_directory


def write_tokenizer(run: Location, to: Path) -> list[Path]:
    """run: the directory of a run's tokenizer. Writes nothing where there is none; returns the files."""
    if not (run / "tokenizer.json").is_file():
        return []
    tokenizer = tokenizers.Tokenizer.from_buffer((run / "tokenizer.json").read_bytes())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if tokenizer.num_special_tokens_to_add(is_pair=False):
        tokenizer.post_processor = None
    tokenizer.save(str(to / "tokenizer.json"))
    config = json.loads((run / "tokenizer_config.json").read_text()) | {"split_special_tokens": True}
    (to / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (to / FACTS).write_bytes((run / FACTS).read_bytes())
    return [to / name for name in ("tokenizer.json", "tokenizer_config.json", FACTS)]


def generation_config(run: Location, vocab_size: int) -> dict[str, Any]:
    """generation_config.json: what ends a text, what fills a batch (any id does), and which ids of the model the tokenizer has not; nothing where
    there is no tokenizer. run: as above; vocab_size: of the model."""
    if not (run / FACTS).is_file():
        return {}
    facts = json.loads((run / FACTS).read_text())
    end, used = facts["end_of_document"], facts["vocab_size"]
    config = {"eos_token_id": end, "pad_token_id": end}
    return config if used == vocab_size else config | {"suppress_tokens": list(range(used, vocab_size))}

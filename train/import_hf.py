"""Makes a checkpoint to start from out of a Hugging Face model.

python -m train.import_hf checkpoint=exported to=runs/imported
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from train.arguments import key_values
from train.huggingface.config import clamp
from train.huggingface.load import import_hf


def main(arguments: Sequence[str]) -> int:
    """The command; exit status 2 for wrong arguments."""
    try:
        values = key_values(arguments, ("checkpoint", "to"))
        for key in ("checkpoint", "to"):
            if not isinstance(values.get(key), str):
                raise ValueError(f"{key}=... is missing: python -m train.import_hf checkpoint=exported to=runs/imported")
        path = import_hf(Path(values["checkpoint"]), Path(values["to"]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Imported into {path}.")
    least = clamp(json.loads((Path(values["checkpoint"]) / "config.json").read_text()))
    if least is not None:
        print(
            f"Its config.json has time_step_min={least:g}: transformers clamps dt there, this model (like Megatron) does not, so logits may differ."
        )
    print(f"Start a run from it with checkpoint.initialize_from={values['to']} and the model group of {values['to']}/recipe.yaml.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

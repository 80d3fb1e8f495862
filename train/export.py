"""Writes a checkpoint for Hugging Face: config.json, safetensors and the tokenizer.

python -m train.export checkpoint=runs/tiny to=exported
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from train.arguments import key_values
from train.checkpoint.reader import open_checkpoint
from train.huggingface.export import export


def main(arguments: Sequence[str]) -> int:
    """The command; exit status 2 for wrong arguments."""
    try:
        values = key_values(arguments, ("checkpoint", "to"))
        for key in ("checkpoint", "to"):
            if not isinstance(values.get(key), str):
                raise ValueError(f"{key}=... is missing: python -m train.export checkpoint=runs/tiny to=exported")
        checkpoint = open_checkpoint(values["checkpoint"])
        files = export(checkpoint, Path(values["to"]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Exported {checkpoint.path} (step {checkpoint.step}):")
    for path in files:
        print(f"  {path}  {path.stat().st_size:,} bytes")
    print("Load it with transformers.AutoModelForCausalLM.from_pretrained; transformers ignores mtp.* tensors.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

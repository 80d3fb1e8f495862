"""Writes a checkpoint as transformers, vLLM, SGLang and Megatron-Bridge read it: config.json, safetensors and the tokenizer (docs/export.md).

python -m train.export checkpoint=runs/tiny to=exported dtype=bf16 readers=[vllm,sglang]

format     nvfp4 (compressed-tensors) or nvfp4_modelopt: the codes and scales training multiplied; without it, the weights themselves
dtype      bf16 or fp32; without it, that of the checkpoint
readers    some of transformers, vllm, sglang, megatron_bridge: a model one of them cannot use is refused
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from train.arguments import key_values
from train.checkpoint.reader import open_checkpoint
from train.huggingface.export import export, model_of
from train.huggingface.readers import MTP_LETTERS, problem


def main(arguments: Sequence[str]) -> int:
    """The command; exit status 2 for wrong arguments."""
    try:
        values = key_values(arguments, ("checkpoint", "to", "format", "dtype", "readers"))
        for key in ("checkpoint", "to"):
            if not isinstance(values.get(key), str):
                raise ValueError(f"{key}=... is missing: python -m train.export checkpoint=runs/tiny to=exported")
        checkpoint = open_checkpoint(values["checkpoint"])
        readers = listed if isinstance(listed := values.get("readers", []), list) else [listed]
        format = values.get("format")
        files = export(checkpoint, Path(values["to"]), format=format, dtype=values.get("dtype"), readers=readers)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Exported {checkpoint.path} (step {checkpoint.step}):")
    for path in files:
        print(f"  {path}  {path.stat().st_size:,} bytes")
    problems = {reader: problem(reader, model_of(checkpoint), format) for reader in MTP_LETTERS}
    print(f"Read by {', '.join(reader for reader, found in problems.items() if not found)}; docs/export.md says what each reads.")
    for reader, found in problems.items():
        if found:
            print(f"Not all of it is for {reader}: {found}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""Writes docs/recipes.md, or prints it.

python -m train.recipe.document to=docs/recipes.md
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from train.arguments import key_values
from train.recipe.help import document
from train.refusal import refuse


def main(arguments: Sequence[str]) -> int:
    """The command; exit status 2 for wrong arguments."""
    try:
        values = key_values(arguments, ("to",))
        if "to" in values:
            Path(str(values["to"])).write_text(document())
        else:
            sys.stdout.write(document())
    except (ValueError, OSError) as error:
        return refuse(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""What Hydra and OmegaConf say over many lines about a command line, as one sentence with a remedy."""

import difflib
import re
from collections.abc import Sequence

from hydra.errors import OverrideParseException

from train.recipe.load import RECIPES, base
from train.recipe.reading import flatten

SEE_KEYS = "see the keys with --help"


def one_sentence(error: BaseException, arguments: Sequence[str]) -> str:
    """arguments: the command line that `error` is about."""
    text = " ".join(str(error).split())
    recipes = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    if (match := re.search(r"Cannot find primary config '([^']*)'", text)) is not None:
        return f"-cn {match[1]} names no recipe: use one of {recipes}"
    if (match := re.search(r"Could not find '([^'/]+)/([^']*)'", text)) is not None:
        options = ", ".join(sorted(path.stem for path in (RECIPES / match[1]).glob("*.yaml")))
        return f"{match[1]}={match[2]} is no group option: use one of {options}"
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} is not understood: write key=value, lists as key=[a,b], and quote what a shell or Hydra would read otherwise"
    if (match := re.search(r"Could not override '([^']*)'", text)) is not None:
        return _unknown_key(match[1], arguments)
    return f"{text}: {SEE_KEYS}"


def _unknown_key(key: str, arguments: Sequence[str]) -> str:
    """Names the nearest key that exists."""
    given = next((a for a in arguments if a.lstrip("+~").startswith(f"{key}=")), key)
    near = difflib.get_close_matches(key, [name for name, _ in flatten(base())], n=1, cutoff=0.5)
    return f"{given} sets no key of a recipe: {f'did you mean {near[0]}?' if near else SEE_KEYS}"

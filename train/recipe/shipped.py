"""What recipes/ holds: whole recipes, and the options of each group, with the first sentence of their comments."""

from pathlib import Path

from train.recipe.load import RECIPES


def recipes() -> dict[str, str]:
    """Name -> what it is."""
    return _described(RECIPES)


def options() -> dict[str, dict[str, str]]:
    """Group -> {option -> what it is}."""
    return {group.name: _described(group) for group in sorted(RECIPES.iterdir()) if group.is_dir()}


def _described(directory: Path) -> dict[str, str]:
    return {path.stem: _first_sentence(path.read_text()) for path in sorted(directory.glob("*.yaml"))}


def _first_sentence(text: str) -> str:
    """Of the comment at the top, without Hydra's `@package` line."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.removeprefix("#").strip())
    sentence, _, _ = " ".join(lines).partition(". ")
    return sentence.removesuffix(".").strip()

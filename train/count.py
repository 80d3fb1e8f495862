"""How large is the model of a recipe? Counted on the real modules, without allocating them.

python -m train.count -cn nemotron3_super
"""

from model.count import count, linear_modules, other_products
from train.recipe.cli import main
from train.recipe.tree import Recipe


def run(recipe: Recipe) -> int:
    """Prints parameters, active parameters and forward FLOPs per token."""
    counted = count(recipe.model)
    linear = sum(module.flops for module in linear_modules(recipe.model))
    other = sum(products.flops for products in other_products(recipe.model, recipe.train.sequence_length))
    rows = [
        ("parameters", _billions(counted.parameters)),
        ("active per token", _billions(counted.active)),
        ("MTP blocks, apart", _billions(counted.mtp)),
        ("forward FLOPs per token, linear layers", f"{linear:.4g}"),
        (f"forward FLOPs per token, attention and SSD at {recipe.train.sequence_length} tokens", f"{other:.4g}"),
    ]
    width = max(len(name) for name, _ in rows)
    print(f"{recipe.run.name}: {recipe.model.pattern}")
    for name, value in rows:
        print(f"  {name:{width}}  {value}")
    return 0


def _billions(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.2f}M"


if __name__ == "__main__":
    raise SystemExit(main(run, "train.count", ranks="fewest"))

"""Values of a recipe that do not fit together, and which of them could give way."""


class Misfit(ValueError):
    """Its message says, in one sentence without a full stop, what does not fit, with keys and values, and ends before the remedy.

    keys: of the recipe, or `ranks`, their number, of which a nearby value could mend it. Whoever reads a recipe looks for such values, by
    trying, and ends the sentence with them (see `train.recipe.remedies`): a check says what is wrong. otherwise: what else would help,
    as the end of the sentence.
    """

    def __init__(self, message: str, *keys: str, otherwise: str = "") -> None:
        super().__init__(message)
        self.keys = keys
        self.otherwise = otherwise

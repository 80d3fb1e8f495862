"""What this folder adds, registered at once."""

from tests.extension import evaluator, mixer, number_format, observer, optimizer


def register() -> None:
    for part in (mixer, number_format, optimizer, evaluator, observer):
        part.register()

"""One import registers everything this folder adds."""

from tests.extension import evaluator, mixer, number_format, observer, optimizer

__all__ = ["evaluator", "mixer", "number_format", "observer", "optimizer"]

"""Draws the loss curves of a run when it ends."""

from __future__ import annotations

from train.observe.base import Observer


class LossPicture(Observer):
    """Draws <run>/report/loss.png when the run ends."""

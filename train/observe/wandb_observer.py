"""Weights & Biases: the same numbers, offline by default; a failure is reported once and never stops a run."""

from __future__ import annotations

from train.observe.base import MonitorConfig, Observer


class WandbObserver(Observer):
    """Logs to Weights & Biases below <run>/wandb."""

    def __init__(self, config: MonitorConfig) -> None:
        self.config = config

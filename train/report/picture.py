"""The picture of the losses that a run leaves when it ends."""

from pathlib import Path


def draw_losses_of(run_dir: Path) -> Path:
    """Draws <run>/report/loss.png and returns its path. Raises ValueError for a run without a logged step, OSError where it cannot be written."""
    from train.report.report import draw_loss_curve  # here: matplotlib takes a second that only the end of a run should pay

    return draw_loss_curve(run_dir)

"""What a run draws when it ends: the picture of its losses, or its whole report."""

from pathlib import Path


def draw_losses_of(run_dir: Path) -> Path:
    """Draws <run>/report/loss.png and returns its path. Raises ValueError for a run without a logged step, OSError where it cannot be written."""
    from train.report.report import draw_loss_curve  # here: matplotlib takes a second that only the end of a run should pay

    return draw_loss_curve(run_dir)


def draw_report_of(run_dir: Path) -> Path:
    """Draws the whole report of one run below <run>/report and returns its page. Raises as the above."""
    from train.report.report import write_report  # here: as above

    return write_report([run_dir], run_dir / "report")

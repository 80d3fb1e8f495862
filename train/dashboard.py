"""A W&B workspace for a run, with the sections of the local report, which is drawn in any case and needs nothing.

    python -m train.dashboard run=runs/x              # <run>/report/index.html, and the workspace where there is an account
    python -m train.dashboard run=runs/x to=spec.json # also writes the workspace as W&B would be sent it

Needs wandb-workspaces, an extra: pip install -c constraints.txt -e '.[dashboard]'. The workspace shows every run of its project that is not hidden
there; the
project and the account are those of the run's recipe (monitor.wandb_project, monitor.wandb_entity).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from train.arguments import key_values
from train.observe.redact import redacted
from train.report.report import write_report
from train.report.sections import SECTIONS, Panel
from train.report.tables import stored_recipe

_COLUMNS = 3


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit status (2 after one sentence about what is wrong with the arguments or the run)."""
    try:
        values = key_values(arguments, ("run", "to"))
        if "run" not in values:
            raise ValueError("run= is missing: write for instance run=runs/first")
        run_dir = Path(str(values["run"]))
        index = write_report([run_dir], run_dir / "report")
        monitor = stored_recipe(run_dir).get("monitor") or {}
        print(index)
        print(workspace_line(run_dir, monitor, Path(str(values["to"])) if "to" in values else None))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def workspace_line(run_dir: Path, monitor: dict[str, Any], to: Path | None = None) -> str:
    """Builds the workspace and saves it; returns its address, or one sentence that says why there is none."""
    local = "the page above has the same sections"
    if find_spec("wandb_workspaces") is None:
        return f"No W&B workspace: wandb-workspaces is not installed (pip install -c constraints.txt -e '.[dashboard]'); {local}"
    project, entity = str(monitor.get("wandb_project") or "nibble"), monitor.get("wandb_entity")
    if to is not None:
        to.write_text(json.dumps(specification(build_workspace(entity or "entity", project, _name(run_dir))), indent=1) + "\n")
    if monitor.get("wandb") == "disabled":
        return f"No W&B workspace: the run has monitor.wandb=disabled; {local}"
    import wandb  # here, as wandb-workspaces: seconds that an answer without an account should not take

    try:
        if not wandb.login(prompt=False, verify=False):
            return f"No W&B workspace: no API key is set up (run `wandb login` once); {local}"
        entity = entity or wandb.Api().default_entity
        if not entity:
            return f"No W&B workspace: the account has no default entity (set monitor.wandb_entity); {local}"
        workspace = build_workspace(str(entity), project, _name(run_dir))
        workspace.save()
    except Exception as error:  # W&B raises its own, network and permission errors
        reason = (redacted(str(error)).strip() or type(error).__name__).splitlines()[0]
        return f"No W&B workspace: W&B refused it ({reason}); {local}"
    return str(workspace.url)


def build_workspace(entity: str, project: str, name: str) -> Any:
    """The sections as a `wandb_workspaces.workspaces.Workspace`; nothing is sent."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    def chart(panel: Panel) -> Any:
        return reports.LinePlot(
            title=panel.title,
            x="step",
            metric_regex=f"^({panel.pattern})$",
            title_x="step",
            title_y=panel.unit or None,
            log_y=panel.log or None,
        )

    sections = []
    for section in SECTIONS:
        panels: list[Any] = [chart(panel) for panel in section.panels]
        if section is SECTIONS[0]:
            panels.append(reports.MediaBrowser(title="Curves of the report", media_keys=["report/loss"]))
        layout = workspaces.SectionLayoutSettings(columns=_COLUMNS, rows=-(-len(panels) // _COLUMNS))
        sections.append(workspaces.Section(name=section.title, panels=panels, is_open=True, layout_settings=layout))
    return workspaces.Workspace(entity=entity, project=project, name=name, sections=sections)


def specification(workspace: Any) -> dict[str, Any]:
    """What W&B is sent when the workspace is saved, as JSON values."""
    return json.loads(workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))


def _name(run_dir: Path) -> str:
    return f"Nibble: {run_dir.resolve().name}"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""The workspace: the sections of the report, every metric of a run in one of them, and one sentence where it cannot be saved."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.train.report.runs import make_run
from train.dashboard import build_workspace, main, specification
from train.report.report import PICTURES
from train.report.sections import SECTIONS

TITLES = ["Loss and gap", "MTP", "Throughput and goodput", "MoE balance", "Precision health", "Incidents"]
LOGGED = (
    "loss/lm loss/mtp_1 loss/mtp_2 loss/total grad_norm learning_rate moe/max_violation moe/aux_loss step_seconds tokens_per_second "
    "memory_peak_bytes mfu seconds/data seconds/checkpoint precision/share/nvfp4 precision/layers.0.mixer.in_proj/x_t/sqnr_db eval/loss "
    "precision/layers.0.mixer.in_proj/wgrad/zero eval/bits_per_byte"
).split()


def test_every_metric_has_its_panel_and_every_picture_its_section() -> None:
    assert [section.title for section in SECTIONS] == TITLES
    spec = specification(build_workspace("team", "nibble", "Nibble: first"))
    sections = spec["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections][: len(TITLES)] == TITLES
    patterns = [panel["config"].get("metricRegex", "") for section in sections for panel in section["panels"]]
    for name in LOGGED:
        assert [pattern for pattern in patterns if pattern and re.search(pattern, name)], name
    assert not [pattern for pattern in patterns if pattern and re.search(pattern, "tokens")]
    for picture in PICTURES:
        assert [section for section in SECTIONS if picture.name in section.pictures], picture.name


def test_the_command_without_an_account(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "first", recipe={"run": {"name": "first"}, "monitor": {"wandb": "disabled", "wandb_project": "p"}})
    (run / "incidents.jsonl").write_text('{"time": "2026", "step": 7, "kind": "spike", "severe": true, "text": "a <loud> one"}\n{"torn')
    assert main([f"run={run}", f"to={tmp_path / 'spec.json'}"]) == 0
    page, line = capsys.readouterr().out.splitlines()
    assert "monitor.wandb=disabled" in line and Path(page) == run / "report/index.html"
    text = Path(page).read_text()
    headings = re.findall("<h2>(.*?)</h2>", text)
    assert [title for title in headings if title in TITLES] == [title for title in TITLES if title in headings]
    assert {"Loss and gap", "Throughput and goodput", "Incidents"} <= set(headings) and "Further pictures" not in headings
    assert "a &lt;loud&gt; one" in text
    assert json.loads((tmp_path / "spec.json").read_text())["section"]["panelBankConfig"]["sections"][0]["name"] == "Loss and gap"


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"run={tmp_path}"]) == 2 and main([]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "metrics.jsonl" in errors[0] and "run=runs/first" in errors[1]


SAVES = """
import sys, os
from tests.train.observe.wandb_server import WandbServer
server = WandbServer()
os.environ["WANDB_BASE_URL"] = server.url
from train.dashboard import main
assert main([f"run={sys.argv[1]}"]) == 0
import json
print(json.dumps(server.views))
"""


@pytest.mark.slow
def test_the_workspace_is_saved_to_a_server(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first", recipe={"monitor": {"wandb": "online", "wandb_project": "p", "wandb_entity": "team"}})
    environment: dict[str, Any] = {
        **{name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ},
        "HOME": str(tmp_path),
        "NETRC": str(tmp_path / "netrc"),
        "WANDB_API_KEY": "0" * 8 + "f" * 32,
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", SAVES, str(run)], env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *_, address, views = done.stdout.splitlines()
    assert "/team/p" in address, done.stdout
    (view,) = json.loads(views)
    saved = json.loads(view["spec"])
    assert [section["name"] for section in saved["section"]["panelBankConfig"]["sections"]][: len(TITLES)] == TITLES
    assert view["projectName"] == "p" and view["entityName"] == "team"
    assert yaml.safe_load((run / "recipe.yaml").read_text())["monitor"]["wandb_entity"] == "team"

"""The messages that docs/operations.md quotes, and what proves that a failure really produces them.

A message is a line of an indented block, or a quotation of more than three words in the text, unless that is a command. A test that injects a
failure hands what was said to `told(ENTRY, text, ...)`, which finds the messages in it (ENTRY: how the heading begins). `claims` lists these calls
in all tests, and tests/test_runbook.py asks that every message of the runbook is claimed by one. Numbers, paths and hosts are free, and so is what
the runbook leaves out as `...`.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RUNBOOK = Path(__file__).resolve().parents[1] / "docs" / "operations.md"
TESTS = Path(__file__).resolve().parent
COMMAND = r"(?:[A-Z_]+=\S+ )*(?:python|torchrun|srun|sbatch|scancel|scontrol|aws|sh|tail|wandb|pip)\b"


@dataclass(frozen=True)
class Message:
    """entry: the heading it stands under."""

    entry: str
    text: str


@dataclass(frozen=True)
class Claim:
    """A call of `told` in a test: that the messages of an entry which hold `part` (all, where it is empty) are produced there."""

    test: str
    entry: str
    part: str

    def covers(self, message: Message) -> bool:
        return message.entry.startswith(self.entry) and self.part in message.text


def messages() -> list[Message]:
    """In the order of the page."""
    found = []
    for section in re.split(r"^### ", RUNBOOK.read_text(), flags=re.MULTILINE)[1:]:
        heading, _, body = section.split("\n## ")[0].partition("\n")
        lines = body.splitlines()
        found += [Message(heading, line.strip()) for line in lines if line.startswith("    ")]
        text = " ".join(line for line in lines if not line.startswith("    "))
        quoted = [long or short for long, short in re.findall(r"``(.+?)``|`([^`]+)`", text)]
        found += [Message(heading, one) for one in quoted if one.count(" ") > 2 and not re.match(COMMAND, one)]
    return found


def plain(text: str) -> str:
    """Without what differs from run to run."""
    text = re.sub(r"on host [\w.-]+", "on host h", text)
    text = re.sub(r"\b(run id|for run) \w+", r"\1 r", text)
    text = re.sub(r"\b[0-9a-f]{8,}\b", "0", text)
    text = re.sub(r"(?<!\S)[+-](?=\d)", "", text)
    text = re.sub(r"\d(?:[\d.,]*\d)?(?:e[+-]?\d+)?", "0", text)
    text = re.sub(r"\b0(?:, 0)+", "0", text)
    text = re.sub(r"(?:\w+://)?(?:[\w.~:-]*/)+[\w.~-]*", "P", text)
    return re.sub(r"\s+", " ", text)


def told(entry: str, text: str, *parts: str) -> None:
    """Asserts that `text`, what a failure has really printed, holds the messages of this entry that contain one of `parts`; without any, all."""
    of_entry = [message.text for message in messages() if message.entry.startswith(entry)]
    chosen = [one for one in of_entry if not parts or any(part in one for part in parts)]
    assert chosen and all(any(part in one for one in chosen) for part in parts), f"{entry!r} has no such message: {parts}"
    said = plain(text)
    for message in chosen:
        pattern = re.escape(plain(message)).replace(re.escape("..."), ".*?")
        assert re.search(pattern, said), f"docs/operations.md, {entry!r} quotes\n{message}\nbut what was said is\n{text}"


def claims() -> Iterator[Claim]:
    """Every call of `told` in a test, with what it says literally."""
    for path in sorted(TESTS.rglob("*.py")):
        if not re.search(r"^from tests\.runbook import .*\btold\b", path.read_text(), flags=re.MULTILINE):
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "told":
                    entry, *parts = (ast.literal_eval(argument) for argument in (call.args[0], *call.args[2:]))
                    name = f"{path.relative_to(TESTS.parent)}::{function.name}"
                    yield from (Claim(name, entry, part) for part in parts or [""])

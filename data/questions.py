"""Tasks for the lm-evaluation-harness from text that ships with the project: the last 5% of each novel, which `data=austen` trains on no byte of.

    python -m data.questions to=runs/tasks
    python -m train.evaluate checkpoint=runs/tiny tasks=[austen_next,austen_text] include=runs/tasks

austen_next: some sentences, and four that might follow, of about the same length and from the same novel: which did? By chance 25%.
austen_text: how likely the text is, as bits per byte, in pieces of about 1,000 bytes.
"""

import json
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from data.documents import DataError, documents_of

HELD = 0.05
QUESTIONS = 50  # of each novel
CONTEXT = 300  # bytes before a question, at least
LENGTHS = (40, 200)  # of a sentence that is asked for
PIECE = 1000
SEED = 1811

NEXT = {
    "task": "austen_next",
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "target_delimiter": " ",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
TEXT = {
    "task": "austen_text",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
}


def held_out() -> list[str]:
    """The ends of the novels, from a beginning of a sentence on, white space made single spaces."""
    texts = []
    for novel in documents_of("corpus:austen", "text"):
        end = novel[len(novel) - int(len(novel) * HELD) :].decode(errors="ignore")
        texts.append(" ".join(end.split()).partition(". ")[2])
    return texts


def questions(text: str, draw: random.Random) -> list[dict[str, object]]:
    """{context, choices, answer: the place of the right one among them} of one novel."""
    sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", text)
    fit = [place for place, sentence in enumerate(sentences) if LENGTHS[0] <= len(sentence) <= LENGTHS[1]]
    made: list[dict[str, object]] = []
    for place in draw.sample(fit, len(fit)):
        context, first = "", place
        while first > 0 and len(context) < CONTEXT:
            first -= 1
            context = f"{sentences[first]} {context}".strip()
        right = sentences[place]
        others = sorted((n for n in fit if not first <= n <= place), key=lambda n: (abs(len(sentences[n]) - len(right)), n))[:12]
        if len(context) < CONTEXT or len(others) < 3:
            continue
        choices = [right, *(sentences[n] for n in draw.sample(others, 3))]
        draw.shuffle(choices)
        made.append({"context": context, "choices": choices, "answer": choices.index(right)})
        if len(made) == QUESTIONS:
            break
    return made


def pieces(text: str) -> list[dict[str, object]]:
    found, rest = [], text
    while len(rest) > PIECE:
        cut = rest.find(" ", PIECE)
        if cut < 0:
            break
        found.append({"text": rest[:cut]})
        rest = rest[cut + 1 :]
    return [dict(piece) for piece in found]


def write(to: Path) -> str:
    """Writes both tasks and returns a line about them."""
    to.mkdir(parents=True, exist_ok=True)
    draw, texts = random.Random(SEED), held_out()
    documents = {
        "austen_next": [q for text in texts for q in questions(text, draw)],
        "austen_text": [p for text in texts for p in pieces(text)],
    }
    for task in (NEXT, TEXT):
        name = str(task["task"])
        data = (to / f"{name}.jsonl").resolve()
        data.write_text("".join(json.dumps(document) + "\n" for document in documents[name]))
        files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (to / f"{name}.yaml").write_text(json.dumps(task | files, indent=1) + "\n")  # JSON is YAML
    return f"{to}: " + ", ".join(f"{name} ({len(made)} documents)" for name, made in documents.items())


def main(arguments: Sequence[str]) -> int:
    """The command; exit status 2 for wrong arguments."""
    try:
        key, _, value = " ".join(arguments).partition("=")
        if key != "to" or not value:
            raise DataError("to=... is needed: python -m data.questions to=runs/tasks")
        print(write(Path(value)))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""Secrets stay out of what is written."""

from __future__ import annotations

from train.observe.redact import REMOVED, redacted, without_secrets


def test_secrets_are_removed_and_ordinary_keys_stay() -> None:
    recipe = {
        "monitor": {"wandb_api_key": "abc", "password": "x", "wandb": "offline", "hub": {"token": "t"}},
        "train": {"tokens": 100, "sequence_length": 8},
        "data": {
            "tokenizer": "bytes",
            "end_of_document_token": 3,
            "sources": [{"path": "https://me:pw@host/a.txt"}, {"path": "x/0123456789abcdef/y"}],
        },
        "empty": {"secret": None},
    }
    clean = without_secrets(recipe, {"WANDB_API_KEY": "0123456789abcdef", "HOME": "offline-home", "MY_TOKEN": "1"})
    assert clean["monitor"] == {
        "wandb_api_key": REMOVED,
        "password": REMOVED,
        "wandb": "offline",
        "hub": {"token": REMOVED},
    }
    assert clean["train"] == recipe["train"]
    assert clean["data"]["tokenizer"] == "bytes" and clean["data"]["end_of_document_token"] == 3
    assert clean["data"]["sources"] == [{"path": f"https://{REMOVED}@host/a.txt"}, {"path": f"x/{REMOVED}/y"}]
    assert recipe["monitor"]["wandb_api_key"] == "abc"  # type: ignore[index]  # the caller's tree is untouched


def test_a_sentence_that_repeats_a_setting_keeps_its_secret() -> None:
    assert redacted("monitor.wandb_api_key is no key (monitor.wandb_api_key='abc def'): did") == (
        f"monitor.wandb_api_key is no key (monitor.wandb_api_key={REMOVED}): did"
    )
    assert redacted('+hub.token=abc sets no key; "x.password=p"') == f'+hub.token={REMOVED} sets no key; "x.password={REMOVED}"'
    for text in ("train.tokens=100", "data.tokenizer='bytes'", "end_of_document=3 is not a token id"):
        assert redacted(text) == text

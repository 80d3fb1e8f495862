"""Keeps secrets out of everything a run writes about its recipe.

A recipe should hold none; when one does (a key in a URL, an API key given on the command line), it is replaced
before anything is stored. Three signs count: the name of a key, credentials inside a URL, and the value of an
environment variable whose own name says that it is a secret.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

REMOVED = "(removed)"

# `token` alone or as an ending; `tokens`, `tokenizer` and `end_of_token` counts are ordinary words here.
_SECRET_NAME = re.compile(
    r"(^|[_.\-])(api_?key|access_?key|private_?key|secret_?key|secret|token|password|passwd|passphrase|credentials?)$",
    re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(
    r"(api_?key|access_?key|private_?key|secret|(^|_)token$|password|passwd|passphrase|credential)", re.IGNORECASE
)
_SECRET_SETTING = re.compile(
    r"([\w.\-]*(?:api_?key|access_?key|private_?key|secret_?key|secret|(?<![a-z])token|password|passwd|passphrase|credentials?)=)"
    r"(\"[^\"]*\"|'[^']*'|[^\s,;)\]}'\"]+)",
    re.IGNORECASE,
)
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_SHORTEST_SECRET = 8  # characters; shorter values of such variables ("1", "none") are words that may stand anywhere


def without_secrets(recipe: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A copy of `recipe` in which every secret is "(removed)". `environment` defaults to this process's."""
    environment = os.environ if environment is None else environment
    secrets = sorted(
        {v for k, v in environment.items() if len(v) >= _SHORTEST_SECRET and _SECRET_VARIABLE.search(k)},
        key=len,
        reverse=True,
    )
    return {key: _clean(key, value, secrets) for key, value in recipe.items()}


def redacted(text: str) -> str:
    """A line for a person without the secrets of this process's environment, of URLs, and of settings (`x.api_key=...`) it repeats."""
    return _SECRET_SETTING.sub(rf"\1{REMOVED}", str(without_secrets({"line": text})["line"]))


def _clean(key: str, value: Any, secrets: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {inner: _clean(str(inner), item, secrets) for inner, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(key, item, secrets) for item in value]
    if isinstance(value, str) and value:
        if _SECRET_NAME.search(key):
            return REMOVED
        value = _URL_CREDENTIALS.sub(REMOVED, value)
        for secret in secrets:
            value = value.replace(secret, REMOVED)
    return value

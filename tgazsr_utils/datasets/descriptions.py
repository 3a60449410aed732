"""Descriptions of a set's classes, as an objective may read them in place of prompts: a JSON file, class -> texts."""

import json
import re
import sys
import unicodedata
from collections.abc import Sequence

from tgazsr_utils.paths import resolve


def read_descriptions(path: str, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Texts of each of these classes, as many of each as every one has: where some have more, the first, which is told.

    Classes are found whatever the case and punctuation of their names. Raises ValueError, one line, for a file that is
    no JSON of class -> texts, or that lacks a class.
    """
    try:
        given = json.loads(resolve(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"descriptions {path!r} cannot be read as JSON: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"descriptions {path!r} should be an object, class -> list of texts")
    by_name = {_plain(name): texts for name, texts in given.items()}
    found = [_texts(path, name, by_name.get(_plain(name))) for name in names]
    fewest = min(found, key=len)
    if any(len(texts) > len(fewest) for texts in found):
        name = names[found.index(fewest)]
        print(
            f"descriptions: the first {len(fewest)} of each class, as {name!r} has no more", file=sys.stderr, flush=True
        )
    return tuple(tuple(texts[: len(fewest)]) for texts in found)


def _texts(path: str, name: str, texts: object) -> list[str]:
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"descriptions {path!r} has no texts for class {name!r}; it should be a list of some")
    return texts


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFC", name)).strip().casefold()

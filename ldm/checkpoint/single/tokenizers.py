"""Tokenizers inside a single file's header: CLIP's own by its pad token alone, any other with its files.

Stored is a table: `pad_token` and `model_max_length` of CLIP's own, or `files` (name -> content) as a model folder has
them; and `words`, where it is known on which the text encoder was trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoint.build import clip_tokenizer as of_folder
from ldm.checkpoint.save import write_tokenizer_json
from ldm.checkpoint.vocabulary import END, LENGTH, START, clip_tokenizer, is_clips

if TYPE_CHECKING:
    from ldm.nn.text import ClipText, T5Text

KEPT = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def stored(text: ClipText | T5Text, files: Path) -> dict[str, Any]:
    """What the header holds of a text encoder's tokenizer; `files` is a folder that may be filled."""
    from ldm.nn.text import T5Text

    t5 = isinstance(text, T5Text)
    write_tokenizer_json(text.tokenizer, files, "PreTrainedTokenizerFast" if t5 else "CLIPTokenizer")
    table = (files / KEPT[0]).read_text(encoding="utf-8")
    found: dict[str, Any] = {"files": {name: json.loads((files / name).read_text(encoding="utf-8")) for name in KEPT}}
    tokenizer, words = text.tokenizer, getattr(text, "words", None)
    added = {token["content"] for token in json.loads(table)["added_tokens"]}
    if not t5 and is_clips(table) and added == {START, END, tokenizer.pad_token}:
        found = {"pad_token": tokenizer.pad_token, "model_max_length": tokenizer.model_max_length}
    return {**found, **({} if words is None else {"words": sorted(words)})}


def clips(stored: Mapping[str, Any], files: Path) -> Any:
    """CLIP's tokenizer, its own or the one that is stored; `files` is a folder that may be filled."""
    if "files" not in stored:
        return clip_tokenizer(stored["pad_token"], stored.get("model_max_length", LENGTH))

    return of_folder(unpack(stored, files))


def unpack(stored: Mapping[str, Any], files: Path) -> Path:
    """The stored files, in a folder."""
    files.mkdir(parents=True)
    for name in KEPT:
        (files / name).write_text(json.dumps(stored["files"][name], ensure_ascii=False), encoding="utf-8")
    return files

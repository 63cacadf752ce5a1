"""Tokenizers inside a single file's header: CLIP's as its pad token alone, every other one with its files.

The table has `pad_token` and `model_max_length` (CLIP's), or `files` (name -> content, as in a model's folder); and
`words`, the words that the text encoder was trained on, where these are known. In memory it may have `folder` instead,
where the files are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoint.build import clip_tokenizer as of_folder
from ldm.checkpoint.save import write_tokenizer_json
from ldm.checkpoint.vocabulary import END, LENGTH, START, clip_tokenizer, is_clips
from ldm.files import sha256

if TYPE_CHECKING:
    from ldm.nn.text import ClipText, T5Text

TABLES = ("tokenizer.json", "vocab.json", "merges.txt")  # a folder has the first, or CLIP's older two
KEPT = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def stored(text: ClipText | T5Text, files: Path) -> dict[str, Any]:
    """The table for a text encoder's tokenizer; `files` is a folder for temporary files."""
    from ldm.nn.text import T5Text

    t5 = isinstance(text, T5Text)
    write_tokenizer_json(text.tokenizer, files, "PreTrainedTokenizerFast" if t5 else "CLIPTokenizer")
    table = (files / KEPT[0]).read_text(encoding="utf-8")
    entry: dict[str, Any] = {"files": {name: json.loads((files / name).read_text(encoding="utf-8")) for name in KEPT}}
    tokenizer, words = text.tokenizer, getattr(text, "words", None)
    added = {token["content"] for token in json.loads(table)["added_tokens"]}
    if not t5 and is_clips(table) and added == {START, END, tokenizer.pad_token}:
        entry = {"pad_token": tokenizer.pad_token, "model_max_length": tokenizer.model_max_length}
    return {**entry, **({} if words is None else {"words": sorted(words)})}


def clips(stored: Mapping[str, Any], files: Path) -> Any:
    """CLIP's standard tokenizer, the stored one, or that of a folder; `files` is a folder for temporary files."""
    if "files" not in stored and "folder" not in stored:
        return clip_tokenizer(stored["pad_token"], stored.get("model_max_length", LENGTH))

    return of_folder(unpack(stored, files))


def digests_of_given(tokenizers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """sha256 of the tokenizers that are not in the model's file, but in folders: part of the model's hash."""
    folders = [Path(stored["folder"]) for _, stored in sorted(tokenizers.items()) if "folder" in stored]
    return [sha256(folder / name) for folder in folders for name in TABLES if (folder / name).is_file()]


def unpack(stored: Mapping[str, Any], files: Path) -> Path:
    """Write the stored files into a folder, or name the folder where they are."""
    if "folder" in stored:
        return Path(stored["folder"])
    files.mkdir(parents=True)
    for name in KEPT:
        (files / name).write_text(json.dumps(stored["files"][name], ensure_ascii=False), encoding="utf-8")
    return files

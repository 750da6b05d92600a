"""Model folders by hub id or path, without ever downloading: what is missing is said."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from odvla.errors import UserError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_folder(name: str, setting: str, file: str) -> Path:
    """The folder of a model or tokenizer on this machine.

    Args:
        name: path of a folder, or a Hugging Face hub id whose files have been fetched before.
        setting: that names it, for messages.
        file: that the folder must hold.

    Raises:
        UserError: there is no such folder; for a hub id it says which command fetches the files.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if not _HUB_ID.fullmatch(name):
            raise UserError(f"{setting} {folder} is not a folder")
        fetch = f"fetch it with: hf download {name}"
        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except (LocalEntryNotFoundError, OSError) as error:
            raise UserError(f"{setting} {name} is not on this machine; {fetch}") from error
        if not (folder / file).is_file():
            raise UserError(f"{setting} {name}: {file} is not on this machine; {fetch}")
    if not (folder / file).is_file():
        raise UserError(f"{setting} {folder} is not a model folder: it has no {file}")
    return folder

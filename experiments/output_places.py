"""Whether something can be written where the user wants it, told before the work begins."""

from __future__ import annotations

import os
from pathlib import Path

from odvla.errors import UserError


def check_folder(path: Path) -> None:
    """Refuse a folder that is not there and cannot be made, or that nothing can be written to.

    Raises:
        UserError: naming what is in the way.
    """
    place = path.expanduser().absolute()
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    if not there.is_dir():
        what = "is a file, not a folder" if there == place else f"cannot be made: {there} is a file"
        raise UserError(f"{path} {what}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: {there} does not permit it")


def check_file(path: Path, endings: tuple[str, ...] = ()) -> None:
    """Refuse a file that cannot be written.

    Args:
        path: where it goes; what is there is overwritten.
        endings: that its name may have, e.g. ".png"; (): any.

    Raises:
        UserError: naming what is in the way.
    """
    if endings and path.suffix.lower() not in endings:
        raise UserError(f"{path} must end in {' or '.join(endings)}")
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a file")
    check_folder(path.parent)

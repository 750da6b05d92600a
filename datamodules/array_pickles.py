"""Pickles of numbers, texts, containers and numpy arrays, read without running any code of theirs.

A pickle from the internet may run any code when it is loaded. The unpickler here makes builtins and
numpy arrays only and refuses the rest by name before it is called.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from odvla.errors import UserError

# What the pickle of numpy arrays and builtins names; everything else is refused.
ALLOWED = (
    {("builtins", name) for name in ("set", "frozenset", "slice", "complex", "bytearray")}
    | {
        (module, name)
        for package in ("numpy.core", "numpy._core")
        for module, name in (
            (f"{package}.multiarray", "_reconstruct"),
            (f"{package}.multiarray", "scalar"),
            (f"{package}.numeric", "_frombuffer"),
        )
    }
    | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
)


class _RefusedError(Exception):
    """The pickle names something that is not allowed."""


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise _RefusedError(f"{module}.{name}")
        return super().find_class(module, name)


def load_arrays(path: Path) -> Any:
    """Unpickle a file that may hold only builtins and numpy arrays.

    Raises:
        UserError: the file is missing, broken, or names anything else.
    """
    try:
        with path.open("rb") as file:
            return _ArrayUnpickler(file).load()
    except FileNotFoundError as error:
        raise UserError(f"the pickle file {path} does not exist") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except MemoryError as error:
        raise UserError(f"{path} asks for more memory than there is: {error}") from error
    except _RefusedError as error:
        raise UserError(f"{path} is refused: it names {error}, where only arrays may be") from error
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        KeyError,
        ImportError,
        OverflowError,
    ) as error:
        raise UserError(f"{path} is not a whole pickle file: {error}") from error

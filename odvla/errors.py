"""The one error that is the user's to mend, and a check that many configurations make."""

from typing import Any


class UserError(ValueError):
    """A mistake in the user's data, configuration or command.

    Its message is one sentence that names the file, record, key or value; the command line prints
    it and exits with 2.
    """


def check_sizes(config: Any, *names: str) -> None:
    """Refuse a size below 1.

    Args:
        config: a dataclass.
        names: of its settings that count or measure something there must be one of.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(config, name)}")

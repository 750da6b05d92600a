"""The one error that is the user's to mend."""


class UserError(ValueError):
    """A mistake in the user's data, configuration or command.

    Its message is one sentence that names the file, record, key or value; the command line prints
    it and exits with 2.
    """

"""The one exception for what a user can mend: entry points print it without a stack trace."""


class UserError(Exception):
    """Bad input. The message names the file, record or config key, and says what to do."""

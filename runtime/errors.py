"""The two exceptions that end a command with one sentence instead of a traceback (see cli.command).
"""


class UserError(Exception):
    """Something the user can fix. The message is one sentence that says what and how."""


class Interrupted(KeyboardInterrupt):
    """SIGINT (Ctrl-C) or SIGTERM. Its arguments are the signal's number and a message."""

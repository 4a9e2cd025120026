"""The one exception that a user's mistake becomes."""


class UserError(Exception):
    """A mistake the user can mend.

    The message is one sentence that names the binding, path or leaf and the way out. The command line prints it without a
    traceback and exits with 2.
    """

"""The one exception that a user sees: a sentence that says what is wrong and what to do about it."""


class UserError(ValueError):
    """Bad input from outside (a file, a config, an argument).

    The command line prints its message on one line and exits with code 2; it never shows a traceback for it.
    Programming errors stay `assert` and ordinary exceptions.
    """

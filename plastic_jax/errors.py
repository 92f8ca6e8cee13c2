"""The one exception that a user's input can cause."""


class InputError(ValueError):
    """Bad input, said in one sentence that names the field, the value and what is allowed.

    Entry points print the sentence and end with exit code 2, without a traceback.
    """

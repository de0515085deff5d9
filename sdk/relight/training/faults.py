"""Why a training cannot go on, as its operation will say it."""


class TrainingFault(Exception):
    """`permanent`: the same job would fail the same way again. The message says what to do.

    `traceback` is of the user's code, where that is what failed.
    """

    def __init__(self, code: str, message: str, *, permanent: bool, traceback: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.permanent = permanent
        self.traceback = traceback

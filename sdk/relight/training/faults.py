"""Why a training cannot go on, as its operation will say it."""


class TrainingFault(Exception):
    """`permanent`: the same job would fail the same way again. The message says what to do."""

    def __init__(self, code: str, message: str, *, permanent: bool) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.permanent = permanent

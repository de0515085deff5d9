"""Values that a job names and only this worker knows."""

from collections.abc import Iterable, Mapping
from pathlib import Path

VARIABLE = "OPS_SECRET_"


class MissingSecret(Exception):
    """The message says what to set."""


class Secrets:
    """From `OPS_SECRET_<name>` of the agent's environment, else from the file of that name in `directory`."""

    def __init__(self, environ: Mapping[str, str], directory: Path | None) -> None:
        self._environ = environ
        self._directory = directory

    def values(self, names: Iterable[str]) -> dict[str, str]:
        """Read anew for every job: a mounted file may have been replaced. Raises MissingSecret."""
        return {name: self._value(name) for name in names}

    def _value(self, name: str) -> str:
        if (value := self._environ.get(VARIABLE + name)) is not None:
            return value
        file = self._directory / name if self._directory else None
        if file is None or not file.is_file():
            where = f" or the file {file}" if file else ", or OPS_SECRETS_DIR and a file of that name in it,"
            raise MissingSecret(f"this worker has no secret {name}: set {VARIABLE}{name}{where} and start it again")
        try:
            # As `docker secret` and editors leave it; no variable can have a NUL.
            value = file.read_text().removesuffix("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise MissingSecret(f"{file} cannot be read as text: {type(error).__name__}") from None
        if "\x00" in value:
            raise MissingSecret(f"{file} has a NUL in it, which no environment variable can hold")
        return value

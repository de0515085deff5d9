"""How API and workers log: one fact a line, for people or as JSON. Nothing that is logged can forge a line."""

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime

LOG_FORMAT = "OPS_LOG_FORMAT"


class LogFormatError(ValueError):
    """The message names the variable."""


def log_formatter(environ: Mapping[str, str], **context: str) -> logging.Formatter:
    """What OPS_LOG_FORMAT asks for; `context` is in every line of JSON. Raises LogFormatError."""
    match environ.get(LOG_FORMAT) or "text":
        case "text":
            return TextLines()
        case "json":
            return JsonLines(context)
    raise LogFormatError(f"{LOG_FORMAT}: it is text or json")


class TextLines(logging.Formatter):
    """`time LEVEL logger: message operation=… attempt=…`; a traceback follows indented."""

    def format(self, record: logging.LogRecord) -> str:
        about = {"operation": _of(record, "operation_id"), "attempt": _of(record, "attempt")}
        said = "".join(f" {name}={value}" for name, value in about.items() if value is not None)
        first = f"{self.formatTime(record)} {record.levelname} {record.name}: {record.getMessage()}{said}"
        trace = self.formatException(record.exc_info).splitlines() if record.exc_info else []
        return "\n".join([_one_line(first), *(f"    {_one_line(line)}" for line in trace)])


class JsonLines(logging.Formatter):
    """An object a line; `time` is UTC, `exc` the traceback. What is not known is left out."""

    def __init__(self, context: Mapping[str, str]) -> None:
        super().__init__()
        self._context = context

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "operation_id": _of(record, "operation_id"),
            "attempt": _of(record, "attempt"),
            **self._context,
            "exc": self.formatException(record.exc_info) if record.exc_info else None,
        }
        # ASCII: no reader takes one of Unicode's own line ends for the end of the line.
        return json.dumps({name: value for name, value in fields.items() if value is not None}, default=str)


def _of(record: logging.LogRecord, name: str) -> object:
    return getattr(record, name, None)


def _one_line(text: str) -> str:
    """Line ends, terminal sequences and what turns the direction of writing are shown, not done."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

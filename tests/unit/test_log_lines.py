"""A line of the log is one fact: what is logged cannot begin another, and says what it is about."""

import json
import logging
import subprocess
import sys
from uuid import UUID

import pytest

from ops_contract.log_lines import LogFormatError, log_formatter

ID = UUID("1f6e0000-0000-4000-8000-000000000001")
FORGED = "2026-01-01 00:00:00,000 INFO ops_backend.auth: all is well"
SEPARATORS = ["\n", "\r", "\x85", "\u2028", "\x1b[2K\x1b[1G", "\u202e", "\udc80"]
HOSTILE = [f"a{separator}{FORGED}" for separator in SEPARATORS]


def line(form: str, message: str, error: BaseException | None = None, **extra: object) -> str:
    record = logging.makeLogRecord(
        {"name": "ops", "levelname": "WARNING", "created": 0.0, "msg": "%s", "args": (message,), **extra}
    )
    record.exc_info = (type(error), error, None) if error else None
    return log_formatter({"OPS_LOG_FORMAT": form}, worker="w1").format(record)


@pytest.mark.parametrize("message", HOSTILE)
def test_no_message_begins_a_line_of_text(message: str) -> None:
    assert line("text", message).isprintable()


@pytest.mark.parametrize("message", HOSTILE)
def test_no_message_begins_a_line_of_json_and_all_of_it_is_kept(message: str) -> None:
    written = line("json", message, ValueError(message))
    assert written.isascii()
    assert written.isprintable()
    assert json.loads(written)["message"] == message


@pytest.mark.parametrize("message", HOSTILE)
def test_every_line_of_a_traceback_is_indented(message: str) -> None:
    first, *trace = line("text", "it broke", ValueError(message)).split("\n")
    assert first.endswith("it broke")
    assert trace
    assert all(told.startswith("    ") and told.isprintable() for told in trace)


def test_text_shows_operation_and_attempt_where_they_are_known() -> None:
    about = line("text", "lease ran out: operation is pending", operation_id=ID, attempt=2)
    assert about.endswith(f" WARNING ops: lease ran out: operation is pending operation={ID} attempt=2")
    assert line("text", "tick failed", operation_id=None).endswith(" WARNING ops: tick failed")


def test_json_has_a_field_for_each_and_none_for_what_is_not_known() -> None:
    told = json.loads(line("json", "fenced", ValueError("why"), operation_id=ID, attempt=2))
    assert told == {
        "time": "1970-01-01T00:00:00.000+00:00",
        "level": "WARNING",
        "logger": "ops",
        "message": "fenced",
        "operation_id": str(ID),
        "attempt": 2,
        "worker": "w1",
        "exc": "ValueError: why",
    }
    assert set(json.loads(line("json", "plain"))) == {"time", "level", "logger", "message", "worker"}


def test_another_format_is_refused_by_its_name() -> None:
    with pytest.raises(LogFormatError, match="OPS_LOG_FORMAT: it is text or json"):
        log_formatter({"OPS_LOG_FORMAT": "xml"})


@pytest.mark.slow
@pytest.mark.parametrize("module", ["ops_backend", "ops_worker"])
def test_a_process_with_a_wrong_format_says_so_and_does_not_start(module: str, tmp_path: object) -> None:
    verb = {"ops_backend": ["server"], "ops_worker": []}[module]
    environ = {
        "OPS_LOG_FORMAT": "xml",
        "OPS_API_URL": "http://x",
        "OPS_API_TOKEN": "t",
        "OPS_STORAGE_ROOT": str(tmp_path),
    }
    command = [sys.executable, "-P", "-m", module, *verb]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "OPS_LOG_FORMAT: it is text or json" in ended.stderr

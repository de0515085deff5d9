"""The API is killed while a training runs: it goes on, and all that it had to say is there when the API is back."""

import math
import shutil
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from uuid import UUID

import pytest

from helpers.service import Service, eventually

UNTIL_NAN = {"max_epochs": 12, "learning_rate": 1e30}  # from the second step on the loss is NaN


@pytest.mark.slow
def test_what_ended_while_the_api_was_away_and_its_agent_started_again_is_complete_once(
    service: Service, tmp_path: Path
) -> None:
    """Scenarios 16 and 17, with a NaN in the backlog."""
    id = service.submit(**UNTIL_NAN)
    service.until_step(id, 30)
    worker = service.worker_of(service.attempts(id)[0])
    service.server.kill()
    service.server.close()
    outbox = service.directory / worker.name / "outbox"
    eventually(lambda: stored(outbox, tmp_path / "outbox", id), "the training has ended", service.logs)
    worker.kill()
    worker.close()
    worker.start()
    eventually(lambda: "sending what worker" in worker.log.read_text(), "the next agent has found it", service.logs)
    service.restart_server()

    operation = service.wait(id, "completed")

    loss = service.metric(id, "loss").points
    assert [step for step, _ in loss] == list(range(576))
    assert math.isnan(loss[-1][1])
    assert (operation.attempt, operation.failures) == (1, 0)
    assert service.events(id) == ["submit", "claim", "note", "complete"]


def stored(outbox: Path, copy: Path, id: UUID) -> bool:
    """Whether its finish waits there, on disk: what a copy has, since the living agent keeps its outbox locked."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(outbox, copy)
    sql = "SELECT count(*) FROM reports WHERE operation_id = ? AND json_extract(report, '$.kind') = 'finish'"
    for path in copy.glob("*.db"):
        with closing(sqlite3.connect(path)) as database, suppress(sqlite3.DatabaseError):  # copied while it was written
            if database.execute(sql, (str(id),)).fetchone()[0]:
                return True
    return False

"""The history of a real operation, as people read it."""

import re
from typing import Any

from helpers.store import Store, held, saved, started
from ops_backend.store import queries
from ops_contract.lifecycle import Outcome


async def test_a_history_reads_as_a_story(store: Store) -> None:
    await store.worker(name="worker-1", slots=4)
    attempt = await store.running(max_retries=1)
    attempt = await store.report(attempt, started(), checkpoint := saved(attempt, 120))
    fault = {"code": "trainer_killed", "message": "killed by SIGKILL"}
    await store.finish(attempt, Outcome.FAILED, error=fault)
    second = await again(store)
    await store.finish(second, Outcome.FAILED, error=fault)
    await store.resume(attempt.operation_id)
    third = await again(store)
    await store.expire(third)
    await store.lose(third)
    await store.cancel(attempt.operation_id)

    async with store.sessions.begin() as session:
        events = (await queries.events(session, attempt.operation_id, 0)).items

    short = str(checkpoint.checkpoint_id)[:8]
    assert [re.sub(r"in [\d.e-]+ s", "in N s", event.message) for event in events] == [
        "submitted by me",
        "attempt 1 began on worker-1 at step 0",
        "attempt 1 failed: killed by SIGKILL (trainer_killed); tried again in N s (1 of 1)",
        f"attempt 2 began on worker-1 at step 120, from checkpoint {short}",
        "attempt 2 failed: killed by SIGKILL (trainer_killed); no retry is left",
        f"resumed at step 120, from checkpoint {short}",
        f"attempt 3 began on worker-1 at step 120, from checkpoint {short}",
        "worker-1 was lost with attempt 3: it renewed its lease no more; back in the queue, not charged",
        "cancelled while it waited",
    ]


async def again(store: Store) -> Any:
    claim = await store.claim()
    assert claim is not None
    return held(claim)

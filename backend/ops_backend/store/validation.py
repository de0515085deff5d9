"""Which worker can say whether a job is right."""

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.sql import TAKES_WORK, statement
from ops_contract.jobs import Job, is_users_own, runs_user_code

# One that would take it. Any of them: a hanging one must not be asked again and again.
FIND_WORKER = statement(f"""
    SELECT w.incarnation, w.url, w.secret FROM workers w
     WHERE {TAKES_WORK}
       AND (w.user_code OR NOT :user_code)
       AND (:own OR :workload = ANY (w.workloads)
                    AND (:plans OR (SELECT validates FROM workloads WHERE name = :workload)))
       AND EXISTS (SELECT FROM slots s
                    WHERE s.incarnation = w.incarnation AND s.cores >= :cores
                      AND (:device = 'auto' OR s.device = :device))
     ORDER BY random()
     LIMIT 1
""")


@dataclass(frozen=True)
class Question:
    """A job, and the worker to ask about it."""

    job: Job
    incarnation: UUID
    url: str
    secret: str


async def question(session: AsyncSession, job: Job, lease_s: float) -> Question | None:
    """None where no worker knows better than the stored schema, or none is there. A study is planned to be judged."""
    if job.command is not None and job.study is None:
        return None
    values = {
        "user_code": runs_user_code(job),
        "own": is_users_own(job.workload),
        "plans": job.study is not None,
        "workload": job.workload,
        "cores": 1 if job.study else job.resources.cores or 1,
        "device": "auto" if job.study else job.execution.accelerator,
        "lease_s": lease_s,
    }
    worker = (await session.execute(FIND_WORKER, values)).one_or_none()
    return Question(job, worker.incarnation, worker.url, worker.secret) if worker else None

"""What a study would take, by what trainings of the same workload took here of late."""

from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.ledger import IN_SUMS, MICRO
from ops_backend.store.placement import runs
from ops_backend.store.sql import TAKES_WORK, statement
from ops_backend.tables import quoted
from ops_contract.jobs import Job
from ops_contract.operations import StudyPreview
from ops_contract.plans import Plan

RECENT = 20

# By 6ND, start-up and evaluation included: that is what the next ones will take too.
PACE = statement(f"""
    SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY flops / running_s) AS flops_per_s,
           percentile_cont(0.5) WITHIN GROUP (ORDER BY energy_uj / flops)
               FILTER (WHERE unknown = 0) AS uj_per_flop, count(*) AS trainings
      FROM (SELECT 6.0 * (x.content->>'params')::float8 * (x.content->>'units')::float8 AS flops, ran.running_s,
                   used.energy_uj, used.unknown
              FROM operations o JOIN results x ON x.operation_id = o.id
             CROSS JOIN LATERAL (SELECT sum(extract(epoch FROM a.ended_at - a.started_at))::float8 AS running_s
                                   FROM attempts a WHERE a.operation_id = o.id) ran
             CROSS JOIN LATERAL (SELECT sum(s.energy_uj)::float8 AS energy_uj, sum(s.unknown) AS unknown
                                   FROM energy_sums s WHERE s.operation_id = o.id
                                    AND s.quality IN ({quoted(IN_SUMS)})) used
             WHERE o.kind = 'training' AND o.workload = :workload AND o.status = 'completed'
               AND coalesce((o.job->'execution'->>'devices')::int, 1) = :ranks
               AND o.created_at > now() - interval '30 days'
             ORDER BY o.created_at DESC LIMIT {RECENT}) recent
     WHERE flops > 0 AND running_s > 0
""")

SLOTS = statement(f"""
    SELECT count(*) FROM slots s JOIN workers w USING (incarnation)
      JOIN (SELECT CAST(:workload AS text) AS workload, CAST(:job AS jsonb) AS job) o ON {runs("w")}
     WHERE {TAKES_WORK}
       AND s.cores >= :cores AND (:device = 'auto' OR s.device = :device) AND (:ranks = 1 OR s.port IS NOT NULL)
""")


async def preview(session: AsyncSession, job: Job, plan: Plan | None, lease_s: float) -> StudyPreview:
    """Nothing is stored. Of gangs so many train at once as have room together, on whatever hosts."""
    devices = job.execution.devices
    wanted = {
        "workload": job.workload,
        "job": {"env": job.env},
        "cores": job.resources.cores or 1,
        "device": job.execution.accelerator,
        "ranks": devices,
        "lease_s": lease_s,
    }
    slots = await session.scalar(SLOTS, wanted) or 0
    at_once = slots // devices
    pace = (await session.execute(PACE, {"workload": job.workload, "ranks": devices})).one()
    reason = None
    if plan is None:
        reason = "no worker was there to plan it, or none answered in time; look at `ops workers`, and ask again"
    elif plan.flops is None:
        reason = "the FLOPs of a grid are not known before it runs"
    elif pace.flops_per_s is None:
        so_many = f" on {devices} devices" if devices > 1 else ""
        reason = f"no training of {job.workload}{so_many} has completed here yet to go by"
    elif not at_once:
        too_few = f"one of its gangs takes {devices} slots, and {slots} are there"
        reason = too_few if slots else "no worker that could run it is there"
    if plan is None or plan.flops is None or pace.flops_per_s is None or not at_once:
        return StudyPreview(job=job, plan=plan, slots=slots, reason=reason)
    work_s = plan.flops / pace.flops_per_s
    energy_j = None if pace.uj_per_flop is None else plan.flops * pace.uj_per_flop / MICRO
    return StudyPreview(
        job=job,
        plan=plan,
        slots=slots,
        time_s=work_s / min(at_once, len(plan.children)),
        energy_j=energy_j,
        by_trainings=pace.trainings,
        reason=None if energy_j is not None else "the energy of the trainings it goes by is not known",
    )

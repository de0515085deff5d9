"""Studies as the service has them: played by the store as workers would, without one."""

from hashlib import sha256
from typing import Any
from uuid import UUID

from helpers.store import Held, Store, held, losses, started, window
from ops_contract.jobs import Execution
from ops_contract.lifecycle import Outcome, Status
from ops_contract.plans import ChildPlan, GridAbout, IsoFlopAbout, Plan, TrainingResult
from ops_contract.reports import Fault, Result
from ops_contract.study_results import GridResult, GridRow, SweepResult, SweepRow

SWEEP: dict[str, Any] = {"type": "isoflop", "budgets": [1e15, 1e16, 1e17], "size": "config.d_model", "sizes": [64, 128]}
GRID: dict[str, Any] = {"type": "grid", "axes": {"execution.learning_rate": [1e-4, 1e-2]}, "cycles": 3}


async def play(store: Store, result: SweepResult | GridResult, name: str, begun: int | None = None) -> UUID:
    """A study whose children give what `result` has, and which comes to it.

    With `begun` it waits: only so many of its children have ended, the next one runs, and nobody takes the others.
    """
    rows, spec = result.rows, SWEEP if isinstance(result, SweepResult) else GRID
    await store.worker(f"w-{name}", slots=2)
    run = await store.running(study=spec, name=name, max_retries=0)
    plain = {"rows": [], "fit": None, "joules": []} if isinstance(result, SweepResult) else {"rows": [], "groups": []}
    announced = result.model_copy(update=plain)
    run = await store.report(run, started(), Result(content=announced))
    await store.finish(run, Outcome.PLANNED, plan=Plan(children=[_planned(row, name) for row in rows]))
    for row in rows[:begun]:
        await _run(store, await _claimed(store), row)
    if begun is not None:
        await store.report(await _claimed(store), started(), losses((0, 9.0)))
        await store.execute("UPDATE holds SET lease_expires_at = now() + interval '1 day' WHERE ended_at IS NULL")
        await store.execute("UPDATE workers SET last_seen_at = now() + interval '1 day', drain = 'finish'")
        return run.operation_id
    await store.look()
    run = await store.report(await _claimed(store), started(), Result(content=result))
    failed = any(row.status is Status.FAILED for row in rows)
    why = Fault(code="children_failed", message="one of its children did not complete")
    await store.finish(run, Outcome.FAILED if failed else Outcome.COMPLETED, **({"error": why} if failed else {}))
    return run.operation_id


async def end_running(store: Store) -> None:
    """The one child that runs completes."""
    [(id, incarnation)] = await store.fetch("SELECT operation_id, incarnation FROM holds WHERE ended_at IS NULL")
    child = Held(id, 1, incarnation, seq=3)
    child = await store.report(child, losses((0, 7.0), name="val_loss"))
    await store.finish(child, Outcome.COMPLETED)


async def _claimed(store: Store) -> Held:
    claim = await store.claim()
    assert claim is not None
    return held(claim)


def _planned(row: SweepRow | GridRow, study: str) -> ChildPlan:
    about: IsoFlopAbout | GridAbout
    if isinstance(row, SweepRow):
        name = row.experiment_id
        about = IsoFlopAbout(
            budget=row.compute_budget,
            size=row.size,
            params=row.model_size,
            flops_per_token=6.0 * row.model_size,
            tokens=row.num_tokens or 1,
            seed=row.seed,
        )
    else:
        name, about = row.name, GridAbout(point=row.point, cycle=row.cycle)
    key = sha256(f"{study} {name}".encode()).hexdigest()
    return ChildPlan(key=key, name=name, about=about, execution=Execution(checkpoint_monitor="val_loss"))


def _name(row: SweepRow | GridRow) -> str:
    return "val_loss" if isinstance(row, SweepRow) else next(iter(row.final))


async def _run(store: Store, child: Held, row: SweepRow | GridRow) -> None:
    loss = row.final_loss if isinstance(row, SweepRow) else next(iter(row.final.values()))
    child = await store.report(child, started(), losses((0, 9.0)))
    if row.energy_j is not None:
        await store.book(child, window(1, energy_j=row.energy_j))
    if loss is None:
        why = Fault(code="exception", message=row.error_message or "it failed")
        await store.finish(child, Outcome.FAILED, permanent=True, error=why)
        return
    trained = TrainingResult(steps=1, samples=1, units=getattr(row, "num_tokens", 1), params=1, embedding_params=0)
    child = await store.report(child, losses((0, loss), name=_name(row)), Result(content=trained))
    await store.finish(child, Outcome.COMPLETED)

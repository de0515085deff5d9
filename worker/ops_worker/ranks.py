"""How the processes of one hold end together."""

import asyncio
from collections.abc import Sequence

from ops_contract.lifecycle import Outcome
from ops_contract.reports import PEER_LOST, Fault, Finish
from ops_worker.processes import JobProcess

# Once a rank has lost a peer: for the others of this worker to say why, if it was one of them. It may keep artifacts
# first, or linger.
CAUSE_S = 30.0


async def run_together(processes: Sequence[JobProcess]) -> Finish | None:
    """Their one finish, once all are gone: a bad end of one is the end of all, and the finish its.

    None when they were killed, before one had ended badly by itself.
    """
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(process.run()) for process in processes]
        cause = await _bad_end(set(tasks))
        silent = [process.rank for process in processes if process.silent]
        for process in processes:
            process.kill()
    if cause is not None:
        return _with_the_silent(cause, silent)
    finishes = [finish for task in tasks if (finish := task.result()) is not None]
    return _agreed(processes, finishes) if len(finishes) == len(tasks) else None


async def _bad_end(running: set[asyncio.Task[Finish | None]]) -> Finish | None:
    """The first with an error, or None when all have ended without. One that only lost a peer is not its cause."""
    lost, killed = None, False
    while running:
        patience_s = CAUSE_S if lost else None
        done, running = await asyncio.wait(running, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        for finish in (task.result() for task in done):
            if finish is None:
                killed = True
            elif finish.error is not None and finish.error.code == PEER_LOST:
                lost = lost or finish
            elif finish.error is not None:
                return finish
        if not done:
            break
    return None if killed else lost


def _with_the_silent(cause: Finish, silent: Sequence[int | None]) -> Finish:
    """A rank that waits in a collective for a hung one is silent too: their stacks tell them apart."""
    if cause.error is None or cause.error.code != "stalled" or len(silent) < 2:
        return cause
    ranks = ", ".join(map(str, silent))
    message = f"{cause.error.message} Silent were ranks {ranks}: who waits for a hung one is silent too."
    fault = Fault(code=cause.error.code, message=message, details=cause.error.details | {"silent_ranks": list(silent)})
    return cause.model_copy(update={"error": fault})


def _agreed(processes: Sequence[JobProcess], finishes: Sequence[Finish]) -> Finish:
    if len({finish.outcome for finish in finishes}) == 1:
        return finishes[0]
    outcomes = {str(process.rank): finish.outcome.value for process, finish in zip(processes, finishes, strict=True)}
    said = ", ".join(f"{rank} {outcome}" for rank, outcome in outcomes.items())
    message = f"The ranks of this training ended differently: {said}. All of them have to take the same steps."
    fault = Fault(code="ranks_disagree", message=message, details={"outcomes": outcomes})
    return Finish(outcome=Outcome.FAILED, error=fault)

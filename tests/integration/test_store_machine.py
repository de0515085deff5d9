"""A stateful test of the real store on real Postgres, with concurrent callers, against the transition table.

Each step fires up to three calls at once. What they answer, and where the operation stands afterwards, must be what
some order of the same calls gives on a plain model of the table; the events must be a path of the table itself.
Taking a guard out of a statement makes it fail: the last tests do that, so the checker is known to see.
"""

import asyncio
import dataclasses
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from helpers.databases import Databases
from helpers.store import Held, Store, at_once, held, saved, started
from ops_backend.database import Sessions
from ops_backend.store import claims, reports, sql, transitions
from ops_backend.store.claims import Claim
from ops_contract.errors import OpsError
from ops_contract.lifecycle import TERMINAL, Outcome, Status, allowed

MAX_RETRIES = 2
OTHER_ENDS = ("lose", "fail", "preempt", "stop", "corrupt", "complete", "fail_for_good")
CALLS = ("claim", "save", "cancel", "resume", "resume_first", *OTHER_ENDS)
# The first call of a step is one that can succeed, and what ends an operation for good is rare: else little happens.
LIKELY = {
    Status.PENDING: ("claim", "claim", "claim", "cancel"),
    Status.RUNNING: (*("save",) * 4, *("cancel",) * 3, *OTHER_ENDS),
    Status.CANCELLING: ("stop", "stop", "lose", "save", "fail"),
    Status.FAILED: ("resume", "resume_first"),
    Status.CANCELLED: ("resume", "resume_first"),
}
LEASES = ("goes on", "goes on", "runs out", "is renewed")
FINISHES = {
    "complete": (Outcome.COMPLETED, False),
    "fail": (Outcome.FAILED, False),
    "fail_for_good": (Outcome.FAILED, True),
    "preempt": (Outcome.PREEMPTED, False),
    "stop": (Outcome.CANCELLED, False),
    "corrupt": (Outcome.CHECKPOINT_CORRUPT, False),
}


@dataclass(frozen=True)
class Model:
    """One operation, one slot: the table of the design in plain Python.

    `steps` are the steps of its committed checkpoints on the lineage, `given` the one that the attempt was given,
    `chosen` the one that a resume chose and no attempt has gone past.
    """

    status: Status = Status.PENDING
    attempt: int = 0
    seq: int = 0
    expired: bool = False
    failures: int = 0
    lost: int = 0
    steps: tuple[int, ...] = ()
    given: int | None = None
    chosen: int | None = None
    by_hand: bool = False
    progressed: bool = False

    def apply(self, call: str, seen: "Model") -> tuple["Model", bool]:
        """After `call`, made by someone who knew the state `seen`; and whether it was accepted."""
        live = self.status in (Status.RUNNING, Status.CANCELLING)
        own = live and self.attempt == seen.attempt
        if call == "claim":
            return (self._claim(), True) if self.status is Status.PENDING else (self, False)
        if call == "cancel":
            return self._cancel()
        if call == "resume":
            return self._resume(self.chosen if self.chosen is not None else max(self.steps, default=None))
        if call == "resume_first":
            first = min(seen.steps, default=None)
            return self._resume(first if first in self.steps else None, by_hand=True)
        if call == "lose":
            return (self._lose(), True) if own and self.expired else (self, False)
        if not own or self.seq != seen.seq:
            # Who repeats the number of a finish that was accepted is told that all is well.
            return self, self.attempt == seen.attempt and self.seq > seen.seq
        if call == "save":
            return self._save(), True
        return self._finish(call), True

    def _claim(self) -> "Model":
        given = self.chosen if self.chosen is not None else max(self.steps, default=None)
        steps = tuple(s for s in self.steps if s <= (given or 0))
        return dataclasses.replace(
            self,
            status=Status.RUNNING,
            attempt=self.attempt + 1,
            seq=1,  # `started` is reported along with the claim
            expired=False,
            given=given,
            steps=steps,
            progressed=False,
        )

    def _cancel(self) -> tuple["Model", bool]:
        if self.status is Status.PENDING:
            return dataclasses.replace(self, status=Status.CANCELLED), True
        if self.status is Status.RUNNING:
            return dataclasses.replace(self, status=Status.CANCELLING), True
        return self, False

    def _resume(self, chosen: int | None, by_hand: bool = False) -> tuple["Model", bool]:
        if self.status not in (Status.FAILED, Status.CANCELLED) or chosen is None:
            return self, False
        state = dataclasses.replace(self, status=Status.PENDING, failures=0, lost=0, chosen=chosen, by_hand=by_hand)
        return state, True

    def _save(self) -> "Model":
        steps = (*self.steps, self.next_step())
        return dataclasses.replace(self, seq=self.seq + 1, steps=steps, chosen=None, progressed=True)

    def next_step(self) -> int:
        """Odd attempts are fast: what a resume leaves behind is often ahead of its successor."""
        return (self.given or 0) + self.seq * (5 if self.attempt % 2 else 1)

    def _lose(self) -> "Model":
        lost = 0 if self.progressed else self.lost + 1
        if self.status is Status.CANCELLING:
            return dataclasses.replace(self, status=Status.CANCELLED, lost=lost)
        status = Status.FAILED if lost >= transitions.MAX_LOST_WITHOUT_PROGRESS else Status.PENDING
        return dataclasses.replace(self, status=status, lost=lost)

    def _finish(self, call: str) -> "Model":
        after = dataclasses.replace(self, seq=self.seq + 1)
        if call == "corrupt":
            after = dataclasses.replace(after, steps=_without(self.steps, self.given), chosen=None)
        if call == "complete":
            return dataclasses.replace(after, status=Status.COMPLETED)
        if self.status is Status.CANCELLING:
            return dataclasses.replace(after, status=Status.CANCELLED)
        if call in ("preempt", "stop"):
            return dataclasses.replace(after, status=Status.PENDING)
        if call == "corrupt":
            by_hand = self.by_hand and self.chosen is not None
            status = Status.PENDING if after.steps and not by_hand else Status.FAILED
            return dataclasses.replace(after, status=status)
        spent = call == "fail_for_good" or self.failures >= MAX_RETRIES
        status = Status.FAILED if spent else Status.PENDING
        return dataclasses.replace(after, status=status, failures=self.failures + 1)


def _without(steps: tuple[int, ...], step: int | None) -> tuple[int, ...]:
    at = steps.index(step) if step in steps else None
    return steps if at is None else steps[:at] + steps[at + 1 :]


class StoreMachine(RuleBasedStateMachine):
    """`databases` is set by the test that runs it."""

    databases: Databases

    def __init__(self) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self._sessions: Sessions | None = None
        self.model = Model()
        self.run = Held(None, 0, None)  # type: ignore[arg-type]

    @initialize()
    def a_new_database(self) -> None:
        self._runner.run(self._open())
        self._runner.run(self._submit())

    async def _open(self) -> None:
        self._sessions = Sessions(await self.databases.fresh(), pool_size=6)
        self.store = Store(self._sessions)
        await self.store.worker()

    async def _submit(self) -> None:
        self.model = Model()
        self.id = await self.store.submit(max_retries=MAX_RETRIES)

    async def _start_over(self) -> None:
        await self.store.execute("TRUNCATE operations CASCADE")
        await self._submit()

    # What is drawn must not depend on who wins, which no seed decides: hence a number, not a call.
    @rule(
        likely=st.integers(0, 999), others=st.lists(st.sampled_from(CALLS), max_size=2), lease=st.sampled_from(LEASES)
    )
    def call_at_once(self, likely: int, others: list[str], lease: str) -> None:
        if self.model.status is Status.COMPLETED:
            self._runner.run(self._start_over())
        if self.model.status in (Status.RUNNING, Status.CANCELLING):
            self._set_lease(lease)
        choices = LIKELY[self.model.status]
        calls = [choices[likely % len(choices)], *others]
        self.oldest = self._runner.run(self._lineage())[:1]
        answers = self._runner.run(at_once_accepted(*(self._call(call) for call in calls)))
        status, attempt = self._runner.run(self._status())
        after = {
            state
            for order in permutations(range(len(calls)))
            for state, accepted in [self._in_order(calls, order)]
            if accepted == answers and (state.status, state.attempt) == (status, attempt)
        }
        assert after, f"{calls} answered {answers} and left {status}: no order of them does, from {self.model}"
        self.model = self._tell_apart(after)

    @invariant()
    def history_is_a_path_of_the_table(self) -> None:
        if self._sessions is not None:
            self._runner.run(self._check_history())

    def teardown(self) -> None:
        if self._sessions is not None:
            self._runner.run(self._sessions.dispose())
        self._runner.close()

    def _set_lease(self, lease: str) -> None:
        if lease == "runs out":
            self._runner.run(self.store.expire(self.run))
            self.model = dataclasses.replace(self.model, expired=True)
        if lease == "is renewed":
            answer = self._runner.run(self.store.heartbeat(self.run.incarnation, self.run))
            assert bool(answer.cancelling) == (self.model.status is Status.CANCELLING)
            self.model = dataclasses.replace(self.model, expired=False)

    def _in_order(self, calls: list[str], order: tuple[int, ...]) -> tuple[Model, list[bool]]:
        state, accepted = self.model, [False] * len(calls)
        for index in order:
            state, accepted[index] = state.apply(calls[index], self.model)
        return state, accepted

    async def _call(self, call: str) -> bool:
        if call == "claim":
            return await self._claim()
        if call == "cancel":
            return await self.store.cancel(self.id) is not None
        if call == "resume":
            return await self.store.resume(self.id) is not None
        if call == "resume_first":
            return bool(self.oldest) and await self.store.resume(self.id, self.oldest[0].id) is not None
        if self.model.attempt == 0:
            return False
        if call == "lose":
            return await self.store.lose(self.run) is not None
        if call == "save":
            await self.store.report(self.run, saved(self.run, self.model.next_step()))
            return True
        outcome, permanent = FINISHES[call]
        await self.store.finish(self.run, outcome, permanent=permanent)
        return True

    async def _claim(self) -> bool:
        claim: Claim | None = await self.store.claim()
        if claim is None:
            return False
        self._claimed = await self.store.report(held(claim), started())
        return True

    async def _status(self) -> tuple[str, int]:
        [row] = await self.store.fetch("SELECT status, attempt FROM operations")
        return row.status, row.attempt

    def _tell_apart(self, states: set[Model]) -> Model:
        """Several orders may explain the answers; what the rows say decides."""
        rows = self._runner.run(self._rows())
        matching = [state for state in states if self._seen(state) == rows]
        assert matching, f"rows say {rows}, but the model {[self._seen(s) for s in states]}"
        [state, *_] = matching
        if state.attempt != self.model.attempt:
            self.run = self._claimed
        self.run = dataclasses.replace(self.run, seq=state.seq + 1)
        return state

    def _seen(self, state: Model) -> tuple[Any, ...]:
        by_hand = state.by_hand and state.chosen is not None
        seq = state.seq if state.attempt else None
        return (state.failures, state.lost, seq, sorted(state.steps), state.chosen, by_hand)

    async def _rows(self) -> tuple[Any, ...]:
        [o] = await self.store.fetch("SELECT * FROM operations")
        seqs = await self.store.fetch("SELECT last_seq FROM holds WHERE attempt = :n", n=o.attempt)
        steps = await self._lineage()
        chosen = await self.store.fetch("SELECT step FROM checkpoints WHERE id = :id", id=o.resume_checkpoint_id)
        return (
            o.failures,
            o.lost_without_progress,
            seqs[0].last_seq if seqs else None,
            [row.step for row in steps],
            chosen[0].step if chosen else None,
            bool(chosen) and o.resume_explicit,
        )

    async def _lineage(self) -> list[Any]:
        """By our own words, not by the store's."""
        return await self.store.fetch("""
            SELECT id, step FROM checkpoints c
             WHERE status = 'committed'
               AND step <= ALL (SELECT start_step FROM attempts a WHERE a.number > c.attempt)
             ORDER BY step""")

    async def _check_history(self) -> None:
        [operation] = await self.store.fetch("SELECT status, attempt FROM operations")
        events = await self.store.fetch("SELECT * FROM events ORDER BY seq")
        assert [e.seq for e in events] == list(range(1, len(events) + 1))
        assert events[-1].to_status == operation.status
        for before, event in zip([None, *events], events, strict=False):
            assert event.from_status == (before.to_status if before else None)
            assert allowed(event.from_status, event.name, event.to_status), f"{event} is not in the table"
        live = await self.store.fetch("SELECT attempt FROM holds WHERE ended_at IS NULL")
        running = operation.status in (Status.RUNNING, Status.CANCELLING)
        assert [hold.attempt for hold in live] == ([operation.attempt] if running else [])
        open_attempts = await self.store.fetch("SELECT number FROM attempts WHERE ended_at IS NULL")
        assert len(open_attempts) == len(live)
        if operation.status in TERMINAL:
            assert not live


async def at_once_accepted(*calls: Any) -> list[bool]:
    answers = await at_once(*calls)
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, OpsError):
            raise answer
    return [answer is True for answer in answers]


def run_machine(databases: Databases, examples: int) -> None:
    machine = type("Machine", (StoreMachine,), {"databases": databases})
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_any_calls_at_once_equal_some_order_of_them(databases: Databases) -> None:
    run_machine(databases, examples=10)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_any_calls_at_once_equal_some_order_of_them_for_long(databases: Databases) -> None:
    run_machine(databases, examples=600)


# Module, statement, guard, what stands in its place.
MUTANTS: dict[str, tuple[Any, str, str, str]] = {
    "finish ignores the order of reports": (transitions, "FINISH", "last_seq = :seq - 1", "true"),
    "finish leaves the hold alive": (transitions, "FINISH", "ended_at = now(), last_seq", "last_seq"),
    "a report counts after its hold has ended": (reports, "ADVANCE", "ended_at IS NULL", "true"),
    "lost ignores the lease": (transitions, "LOST", "lease_expires_at < now()", "true"),
    "cancel takes anything": (
        transitions, "REQUEST_CANCEL", "status IN ('pending', 'running', 'waiting')", "true",
    ),
    "resume takes anything": (transitions, "RESUME", "status IN ('failed', 'cancelled')", "true"),
    "claim takes what is not pending": (claims, "CLAIM", "o.status = 'pending'", "o.status <> 'completed'"),
}  # fmt: skip


# It takes many calls until it shows.
RARE = (
    "finish ignores the order of reports",
    "finish leaves the hold alive",
    "lost ignores the lease",
    "claim takes what is not pending",
)


@pytest.mark.parametrize(
    "mutant", [pytest.param(name, marks=pytest.mark.slow) if name in RARE else name for name in MUTANTS]
)
def test_it_fails_when_a_guard_is_removed(databases: Databases, monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    module, name, guard, instead = MUTANTS[mutant]
    original = getattr(module, name).text
    assert guard in original, f"the guard moved: {guard}"
    monkeypatch.setattr(module, name, sql.statement(original.replace(guard, instead)))
    with pytest.raises((AssertionError, Flaky)):
        run_machine(databases, examples=200)

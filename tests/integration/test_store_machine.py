"""A stateful test of the real store on real Postgres, with concurrent callers, against the transition table.

Each step fires up to three calls at once, of an operation that one worker holds, or a gang of two or three. What they
answer, and where the operation stands afterwards, must be what some order of the same calls gives on a plain model of
the table; the events must be a path of the table itself.
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

from helpers.databases import EMPTY, Databases
from helpers.history import half_gangs
from helpers.store import Held, Store, at_once, holds_of, saved, started
from ops_backend.database import Sessions
from ops_backend.store import claims, reports, sql, transitions
from ops_backend.store.claims import Claim
from ops_contract.errors import OpsError
from ops_contract.lifecycle import TERMINAL, Outcome, Status, allowed
from ops_contract.reports import Fault

MAX_RETRIES = 2
# By devices: how many members an attempt has, of workers with 2, 1 and 1 slots.
MEMBERS = {1: 1, 2: 1, 3: 2, 4: 3}
SLOTS = (2, 1, 1)
OTHER_ENDS = ("lose", "fail", "preempt", "hand_back", "refuse", "stop", "corrupt", "complete", "fail_for_good")
CALLS = ("claim", "save", "cancel", "resume", "resume_first", *OTHER_ENDS)
# The first call of a step is one that can succeed, and what ends an operation for good is rare: else little happens.
LIKELY = {
    Status.PENDING: ("claim", "claim", "claim", "cancel"),
    Status.RUNNING: (*("save",) * 4, *("cancel",) * 3, *OTHER_ENDS),
    Status.CANCELLING: ("stop", "stop", "lose", "save", "fail"),
    Status.FAILED: ("resume", "resume_first"),
    Status.CANCELLED: ("resume", "resume_first"),
}
# Once a member of a gang has left, the others are likely to leave too.
LEAVING = ("complete", "complete", "preempt", "stop", "save", "lose")
# Once the lease of a member has run out.
LIKELY_THEN = ("lose",) * 4
LEASES = ("goes on", "goes on", "runs out", "is renewed")
FAULT = Fault(code="it", message="it")
FINISHES: dict[str, dict[str, Any]] = {
    "complete": {"outcome": Outcome.COMPLETED},
    "fail": {"outcome": Outcome.FAILED},
    "fail_for_good": {"outcome": Outcome.FAILED, "permanent": True},
    "preempt": {"outcome": Outcome.PREEMPTED},
    "hand_back": {"outcome": Outcome.PREEMPTED, "error": FAULT},
    "stop": {"outcome": Outcome.CANCELLED},
    "corrupt": {"outcome": Outcome.CHECKPOINT_CORRUPT},
}
IN_ORDER = ("complete", "preempt", "stop")
BY_A_MEMBER = ("refuse", *FINISHES)


@dataclass(frozen=True)
class Call:
    """`member` counts from any number: whose word it is, of those that the attempt has."""

    name: str
    member: int = 0


@dataclass(frozen=True)
class Model:
    """One operation: the table of the design in plain Python.

    `seqs` are the numbers of its members' newest reports, the leader's first, `left` how each has finished while others
    held the attempt. `steps` are the steps of its committed checkpoints on the lineage, `given` the one that the
    attempt was given, `chosen` the one that a resume chose and no attempt has gone past.
    """

    members: int = 1
    status: Status = Status.PENDING
    attempt: int = 0
    seqs: tuple[int, ...] = ()
    left: tuple[str | None, ...] = ()
    expired: tuple[bool, ...] = ()
    unconfirmed: bool = False
    failures: int = 0
    lost: int = 0
    steps: tuple[int, ...] = ()
    given: int | None = None
    chosen: int | None = None
    by_hand: bool = False
    progressed: bool = False

    def apply(self, call: Call, seen: "Model") -> tuple["Model", bool]:
        """After `call`, made by someone who knew the state `seen`; and whether it was accepted."""
        if call.name == "claim":
            return (self._claim(), True) if self.status is Status.PENDING else (self, False)
        if call.name == "cancel":
            return self._cancel()
        if call.name == "resume":
            return self._resume(self.chosen if self.chosen is not None else max(self.steps, default=None))
        if call.name == "resume_first":
            first = min(seen.steps, default=None)
            return self._resume(first if first in self.steps else None, by_hand=True)
        if seen.attempt == 0 or self.attempt != seen.attempt:
            return self, False
        return self._of_attempt(call, seen)

    def _of_attempt(self, call: Call, seen: "Model") -> tuple["Model", bool]:
        live, who = self.live(), seen.who(call)
        if call.name == "lose":
            return (self._lose(), True) if any(self.expired[member] for member in live) else (self, False)
        if call.name == "refuse":
            return (self._refuse(), True) if who in live and self.seqs[who] == 0 else (self, False)
        if who not in live or self.seqs[who] != seen.seqs[who]:
            # Who repeats the number of a finish that was accepted is told that all is well.
            return self, self.seqs[who] > seen.seqs[who]
        if call.name == "save":
            return self._save(), True
        return self._finish(call.name, who), True

    def live(self) -> list[int]:
        """Members that hold the attempt."""
        running = self.status in (Status.RUNNING, Status.CANCELLING)
        return [member for member, how in enumerate(self.left) if running and how is None]

    def is_over(self) -> bool:
        """For good: there is nothing to resume from."""
        return self.status is Status.COMPLETED or (self.status in TERMINAL and not self.steps)

    def who(self, call: Call) -> int:
        """Only the leader saves."""
        return call.member % self.members if call.name in BY_A_MEMBER else 0

    def _claim(self) -> "Model":
        given = self.chosen if self.chosen is not None else max(self.steps, default=None)
        steps = tuple(s for s in self.steps if s <= (given or 0))
        return dataclasses.replace(
            self,
            status=Status.RUNNING,
            attempt=self.attempt + 1,
            # `started` is reported along with the claim, by the leader
            seqs=(1, *(0,) * (self.members - 1)),
            left=(None,) * self.members,
            expired=(False,) * self.members,
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
        fresh: dict[str, Any] = {"failures": 0, "lost": 0, "unconfirmed": False}
        return dataclasses.replace(self, status=Status.PENDING, chosen=chosen, by_hand=by_hand, **fresh), True

    def _save(self) -> "Model":
        steps = (*self.steps, self.next_step())
        return dataclasses.replace(self, seqs=self._counted(0), steps=steps, chosen=None, progressed=True)

    def next_step(self) -> int:
        """Odd attempts are fast: what a resume leaves behind is often ahead of its successor."""
        return (self.given or 0) + self.seqs[0] * (5 if self.attempt % 2 else 1)

    def _counted(self, who: int) -> tuple[int, ...]:
        return tuple(seq + (member == who) for member, seq in enumerate(self.seqs))

    def _lose(self) -> "Model":
        lost = 0 if self.progressed else self.lost + 1
        if self.status is Status.CANCELLING:
            return dataclasses.replace(self, status=Status.CANCELLED, lost=lost, unconfirmed=True)
        status = Status.FAILED if lost >= transitions.MAX_LOST_WITHOUT_PROGRESS else Status.PENDING
        return dataclasses.replace(self, status=status, lost=lost)

    def _refuse(self) -> "Model":
        if self.status is Status.CANCELLING:
            return dataclasses.replace(self, status=Status.CANCELLED, unconfirmed=len(self.live()) > 1)
        return dataclasses.replace(self, status=Status.PENDING)

    def _finish(self, call: str, who: int) -> "Model":
        """In order it is the last member's that counts, and by the leader's word."""
        others, after = len(self.live()) > 1, dataclasses.replace(self, seqs=self._counted(who))
        if call in IN_ORDER and others:
            left = tuple(call if member == who else how for member, how in enumerate(self.left))
            return dataclasses.replace(after, left=left)
        return self._end(after, (self.left[0] or call) if call in IN_ORDER else call, others)

    def _end(self, after: "Model", call: str, others: bool) -> "Model":
        if call == "corrupt":
            after = dataclasses.replace(after, steps=_without(self.steps, self.given), chosen=None)
        if call == "complete":
            return dataclasses.replace(after, status=Status.COMPLETED)
        if self.status is Status.CANCELLING:
            return dataclasses.replace(after, status=Status.CANCELLED, unconfirmed=others)
        if call in ("preempt", "hand_back", "stop"):
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
        self.runs: list[Held] = []

    @initialize(devices=st.sampled_from(list(MEMBERS)))
    def a_new_database(self, devices: int) -> None:
        self._runner.run(self._open())
        self._runner.run(self._begin(devices))

    async def _open(self) -> None:
        self._url = await self.databases.fresh()
        self._sessions = Sessions(self._url, pool_size=6)
        self.store = Store(self._sessions)

    async def _begin(self, devices: int) -> None:
        for number, slots in enumerate(SLOTS):
            await self.store.worker(f"w-{number}", slots=slots, host=f"h-{number}", slot={"port": 40_000})
        self.model = Model(members=MEMBERS[devices])
        self.runs = []
        self.id = await self.store.submit(max_retries=MAX_RETRIES, execution={"devices": devices})

    async def _start_over(self, devices: int) -> None:
        await self.store.execute(EMPTY)
        await self._begin(devices)

    # What is drawn must not depend on who wins, which no seed decides: hence a number, not a call.
    @rule(
        likely=st.integers(0, 999),
        others=st.lists(st.sampled_from(CALLS), max_size=2),
        members=st.tuples(*[st.integers(0, 5)] * 3),
        lease=st.sampled_from(LEASES),
        devices=st.sampled_from(list(MEMBERS)),
    )
    def call_at_once(self, likely: int, others: list[str], members: tuple[int, ...], lease: str, devices: int) -> None:
        if self.model.is_over() and (self.model.status is Status.COMPLETED or likely >= 250):
            self._runner.run(self._start_over(devices))
        if live := self.model.live():
            self._set_lease(lease, live[members[0] % len(live)])
        choices = LEAVING if live and any(self.model.left) else LIKELY[self.model.status]
        if any(self.model.expired[member] for member in live):
            choices = (*choices, *LIKELY_THEN)
        names = [choices[likely % len(choices)], *others]
        calls = [Call(name, member) for name, member in zip(names, members, strict=False)]
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
            self._runner.run(self.databases.give_back(self._url))
        self._runner.close()

    def _set_lease(self, lease: str, member: int) -> None:
        run = self.runs[member]
        if lease == "runs out":
            self._runner.run(self._expire(run))
            self._set_expired(member, True)
        if lease == "is renewed":
            answer = self._runner.run(self.store.heartbeat(run.incarnation, run))
            assert bool(answer.cancelling) == (self.model.status is Status.CANCELLING)
            self._set_expired(member, False)

    async def _expire(self, run: Held) -> None:
        """Of this member alone."""
        await self.store.execute(
            "UPDATE holds SET lease_expires_at = now() - interval '1 s' WHERE attempt = :n AND incarnation = :who",
            n=run.attempt,
            who=run.incarnation,
        )

    def _set_expired(self, who: int, expired: bool) -> None:
        now = tuple(expired if member == who else was for member, was in enumerate(self.model.expired))
        self.model = dataclasses.replace(self.model, expired=now)

    def _in_order(self, calls: list[Call], order: tuple[int, ...]) -> tuple[Model, list[bool]]:
        state, accepted = self.model, [False] * len(calls)
        for index in order:
            state, accepted[index] = state.apply(calls[index], self.model)
        return state, accepted

    async def _call(self, call: Call) -> bool:
        match call.name:
            case "claim":
                return await self._claim()
            case "cancel":
                return await self.store.cancel(self.id) is not None
            case "resume":
                return await self.store.resume(self.id) is not None
            case "resume_first":
                return bool(self.oldest) and await self.store.resume(self.id, self.oldest[0].id) is not None
        return self.model.attempt > 0 and await self._call_of_attempt(call.name, self.model.who(call))

    async def _call_of_attempt(self, name: str, who: int) -> bool:
        run = self.runs[who]
        if name == "lose":
            return await self.store.lose(run) is not None
        if name == "refuse":
            return await self.store.refuse(self.claim, member=who) is not None
        if name == "save":
            await self.store.report(run, saved(run, self.model.next_step()))
        else:
            await self.store.finish(run, **FINISHES[name])
        return True

    async def _claim(self) -> bool:
        claim: Claim | None = await self.store.claim()
        if claim is None:
            return False
        leader, *others = holds_of(claim)
        self._claimed = claim, [await self.store.report(leader, started()), *others]
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
            self.claim, self.runs = self._claimed
        self.runs = [dataclasses.replace(run, seq=seq + 1) for run, seq in zip(self.runs, state.seqs, strict=True)]
        return state

    def _seen(self, state: Model) -> tuple[Any, ...]:
        by_hand = state.by_hand and state.chosen is not None
        ended = [member not in state.live() for member in range(len(state.seqs))]
        held = list(zip(state.seqs, ended, strict=True))
        return (state.failures, state.lost, held, state.unconfirmed, sorted(state.steps), state.chosen, by_hand)

    async def _rows(self) -> tuple[Any, ...]:
        [o] = await self.store.fetch("SELECT * FROM operations")
        holds = await self.store.fetch(
            "SELECT last_seq, ended_at IS NOT NULL AS ended FROM holds WHERE attempt = :n ORDER BY first_rank",
            n=o.attempt,
        )
        steps = await self._lineage()
        chosen = await self.store.fetch("SELECT step FROM checkpoints WHERE id = :id", id=o.resume_checkpoint_id)
        return (
            o.failures,
            o.lost_without_progress,
            [tuple(hold) for hold in holds],
            o.exit_unconfirmed,
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
        live = await self.store.fetch("SELECT DISTINCT attempt FROM holds WHERE ended_at IS NULL")
        running = operation.status in (Status.RUNNING, Status.CANCELLING)
        assert [hold.attempt for hold in live] == ([operation.attempt] if running else [])
        open_attempts = await self.store.fetch("SELECT number FROM attempts WHERE ended_at IS NULL")
        assert len(open_attempts) == len(live)
        if operation.status in TERMINAL:
            assert not live
        gang = await self.store.fetch("SELECT id, kind, job::text AS job FROM operations")
        holds = await self.store.fetch("SELECT operation_id, attempt, first_rank, ranks FROM holds")
        assert half_gangs([row._mapping for row in gang], [row._mapping for row in holds]) == []


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
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_any_calls_at_once_equal_some_order_of_them(databases: Databases) -> None:
    run_machine(databases, examples=10)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_any_calls_at_once_equal_some_order_of_them_for_long(databases: Databases) -> None:
    run_machine(databases, examples=300)


# Module, statement, guard, what stands in its place.
MUTANTS: dict[str, tuple[Any, str, str, str]] = {
    "finish ignores the order of reports": (
        transitions, "FINISH", ":incarnation AND last_seq = :seq - 1", ":incarnation",
    ),
    "finish leaves the hold alive": (transitions, "FINISH", "ended_at = now(), last_seq", "last_seq"),
    "a report counts after its hold has ended": (reports, "ADVANCE", "ended_at IS NULL", "true"),
    "lost ignores the lease": (transitions, "LOST", "lease_expires_at < now()", "true"),
    "cancel takes anything": (
        transitions, "REQUEST_CANCEL", "status IN ('pending', 'running', 'waiting')", "true",
    ),
    "resume takes anything": (transitions, "RESUME", "status IN ('failed', 'cancelled')", "true"),
    "claim takes what is not pending": (claims, "CLAIM", "status = 'pending' THEN", "status <> 'completed' THEN"),
    "a gang ends with the first that finishes": (transitions, "FINISH", "(:for_all OR count(*) = 1)", "true"),
    "a gang ends by the word of the last": (
        transitions, "FINISH", "coalesce(min(outcome), :outcome)", "coalesce(min(:outcome), :outcome)",
    ),
    "a fault ends its own hold alone": (
        transitions, "FINISH", "moved.attempt AND h.incarnation = locked.incarnation",
        "moved.attempt AND h.incarnation = locked.incarnation AND h.incarnation = :incarnation",
    ),
    "a member leaves out of order": (transitions, "FINISH", "AND locked.last_seq = :seq - 1", ""),
    "a gang is lost with its last member": (transitions, "LOST", "bool_or(lease", "bool_and(lease"),
    "who has begun may refuse": (claims, "REFUSE", "AND last_seq = 0", ""),
    "a refusal ends its own hold alone": (
        claims, "REFUSE", "h.incarnation = locked.incarnation", "h.incarnation = :incarnation",
    ),
    "nobody is missed in a gang that is cut short": (
        transitions, "FINISH", "n.status = 'cancelled' AND (SELECT count(*) FROM locked) > 1", "false",
    ),
}  # fmt: skip


# It takes many calls until it shows.
RARE = (
    "finish ignores the order of reports",
    "finish leaves the hold alive",
    "lost ignores the lease",
    "claim takes what is not pending",
    "a gang ends by the word of the last",
    "a member leaves out of order",
    "a gang is lost with its last member",
    "who has begun may refuse",
    "a refusal ends its own hold alone",
    "nobody is missed in a gang that is cut short",
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

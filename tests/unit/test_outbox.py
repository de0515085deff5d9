"""The outbox on disk, and the delivery that empties it."""

import asyncio
import json
import os
import sqlite3
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, closing
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops_contract.agents import HoldRef, ReportBatch
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.lifecycle import Outcome
from ops_contract.reports import Fault, Finish, Metrics, Note, Progress, Report, Series
from ops_worker.api_client import ApiRefused, ApiUnavailable
from ops_worker.delivery import Delivery
from ops_worker.outbox import BATCH_BYTES, Outbox, Sender
from ops_worker.waiting import Backoff


@pytest.fixture
def ref() -> HoldRef:
    return HoldRef(operation_id=uuid4(), attempt=1)


@pytest.fixture
async def outbox(tmp_path: Path) -> AsyncIterator[Outbox]:
    async with aclosing(Outbox.create(tmp_path, sender())) as outbox:
        yield outbox


def sender(incarnation: UUID | None = None) -> Sender:
    return Sender(incarnation or uuid4(), "http://127.0.0.1:1", "secret")


def note(text: object) -> Note:
    return Note(message=str(text))


def messages(reports: list[str]) -> list[str]:
    return [json.loads(report)["message"] for report in reports]


# ---- on disk


async def test_numbers_each_hold_from_one_and_keeps_the_order(outbox, ref):
    other = ref.model_copy(update={"attempt": 2})

    await outbox.add(ref, [note("a"), note("b")])
    await outbox.add(other, [note("x")])
    await outbox.add(ref, [note("c")])

    assert await outbox.holds() == [ref, other]
    batch = await outbox.batch(ref, 10)
    assert (batch.first_seq, messages(batch.reports)) == (1, ["a", "b", "c"])
    assert (await outbox.batch(other, 10)).first_seq == 1


async def test_what_was_dropped_is_gone_and_its_numbers_are_not_used_again(outbox, ref):
    await outbox.add(ref, [note("a"), note("b")])

    await outbox.drop(ref, 2)
    await outbox.add(ref, [note("c")])

    batch = await outbox.batch(ref, 10)
    assert (batch.first_seq, messages(batch.reports)) == (3, ["c"])


async def test_a_batch_is_bounded_by_count_and_by_size_but_never_empty(outbox, ref):
    big = "x" * (BATCH_BYTES // 50)
    await outbox.add(ref, [Metrics(series=[Series.of("loss", [(step, 1.0) for step in range(100_000)])])])
    await outbox.add(ref, [note(big[:20_000]) for _ in range(80)])

    first = await outbox.batch(ref, 100)
    await outbox.drop(ref, 1)

    assert len(first.reports) == 1
    assert len((await outbox.batch(ref, 7)).reports) == 7
    assert 1 < len((await outbox.batch(ref, 100)).reports) < 80


async def test_a_successor_finds_what_a_dead_agent_committed(tmp_path, ref):
    theirs = sender()
    dead = Outbox.create(tmp_path, theirs)
    await dead.add(ref, [note("a"), note("b")])
    await dead.drop(ref, 1)
    _die(dead)

    (orphan,) = Outbox.orphans(tmp_path)

    assert orphan.sender == theirs
    batch = await orphan.batch(ref, 10)
    assert (batch.first_seq, messages(batch.reports)) == (2, ["b"])
    await orphan.aclose()


async def test_the_outbox_of_a_living_agent_is_no_orphan(tmp_path, ref):
    async with aclosing(Outbox.create(tmp_path, sender())) as living:
        await living.add(ref, [note("a")])

        assert Outbox.orphans(tmp_path) == []
        assert await living.batch(ref, 1)


async def test_of_two_successors_one_gets_it(tmp_path, ref):
    dead = Outbox.create(tmp_path, sender())
    await dead.add(ref, [note("a")])
    _die(dead)

    (first,) = Outbox.orphans(tmp_path)
    assert Outbox.orphans(tmp_path) == []
    await first.aclose()


async def test_an_empty_outbox_leaves_no_file_behind(tmp_path, ref):
    closed, dead, full = (Outbox.create(tmp_path, sender()) for _ in range(3))
    await full.add(ref, [note("a")])
    await closed.aclose()
    _die(dead)
    await full.aclose()

    (orphan,) = Outbox.orphans(tmp_path)
    await orphan.aclose()
    assert orphan.sender == full.sender
    assert {path.stem for path in tmp_path.iterdir()} == {str(full.sender.incarnation)}


async def test_an_outbox_killed_while_it_was_made_is_deleted(tmp_path):
    (tmp_path / f"{uuid4()}.db").touch()
    with_header = tmp_path / f"{uuid4()}.db"
    with closing(sqlite3.connect(with_header)) as database:
        database.execute("PRAGMA journal_mode = WAL")

    assert Outbox.orphans(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


async def test_an_outbox_that_cannot_be_read_stays_for_a_person_to_see(tmp_path, caplog):
    path = tmp_path / f"{uuid4()}.db"
    path.write_bytes(b"not a database, whatever its name says" * 200)

    assert Outbox.orphans(tmp_path) == []

    assert path.exists()
    assert str(path) in caplog.text


async def test_what_an_agent_of_an_earlier_version_left_is_sent_with_what_it_had(tmp_path, ref):
    theirs = sender()
    outbox = Outbox.create(tmp_path, theirs)
    await outbox.add(ref, [note("a")])
    await outbox.aclose()
    with closing(sqlite3.connect(tmp_path / f"{theirs.incarnation}.db")) as database:
        database.execute("ALTER TABLE sender RENAME COLUMN credential TO api_token")

    (orphan,) = Outbox.orphans(tmp_path)

    assert orphan.sender == theirs
    await orphan.aclose()


async def test_nobody_else_may_read_the_credential(tmp_path, ref):
    async with aclosing(Outbox.create(tmp_path / "outbox", sender())) as outbox:
        await outbox.add(ref, [note("a")])

        modes = {path.suffix: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "outbox").iterdir()}

    assert modes == dict.fromkeys([".db", ".db-wal", ".lock"], 0o600)
    assert stat.S_IMODE((tmp_path / "outbox").stat().st_mode) == 0o700


async def test_a_full_disk_is_waited_out(outbox, ref, monkeypatch, caplog):
    monkeypatch.setattr("ops_worker.outbox.DISK_RETRY_S", 0)
    outbox._database.execute("PRAGMA max_page_count = 1")
    adding = asyncio.create_task(outbox.add(ref, [note("x" * 20_000)]))
    async with asyncio.timeout(10):
        while "free some space" not in caplog.text:
            assert not adding.done()
            await asyncio.sleep(0)

    outbox._database.execute("PRAGMA max_page_count = 1000000")
    await adding

    batch = await outbox.batch(ref, 10)
    assert (batch.first_seq, len(batch.reports)) == (1, 1)


def _die(outbox: Outbox) -> None:
    """What SIGKILL does: descriptors close, nothing is tidied."""
    os.close(outbox._lock)
    outbox._database.close()


# ---- delivery


class ScriptedApi:
    """The store's rules for one hold. `script` says what happens to the next calls; then all goes well."""

    def __init__(
        self,
        script: str = "",
        refuses: Callable[[Report], bool] = lambda report: False,
        most_per_batch: int = 1000,
        answer: OpsError | None = None,
    ) -> None:
        self.script: Iterator[str] = iter(script)
        self.refuses = refuses
        self.most_per_batch = most_per_batch
        self.answer = answer
        self.accepted: list[Report] = []
        self.progress: Progress | None = None
        self.calls = 0

    async def send_reports(self, ref: HoldRef, body: str) -> int:
        self.calls += 1
        event = next(self.script, "ok")
        batch = ReportBatch.model_validate_json(body)
        if event == "away":
            raise ApiUnavailable("away")
        if self.answer is not None:
            raise ApiRefused(self.answer.http_status, self.answer.body().error)
        if len(batch.reports) > self.most_per_batch:
            raise ApiRefused(413, None)
        if any(map(self.refuses, batch.reports)):
            raise ApiRefused(422, OpsError(ErrorCode.INVALID, "no such value").body().error)
        assert batch.first_seq <= len(self.accepted) + 1, "a gap"
        self.accepted += batch.reports[len(self.accepted) - batch.first_seq + 1 :]
        self.progress = batch.progress
        if event == "lost":
            raise ApiUnavailable("the answer was lost")
        return batch.first_seq + len(batch.reports) - 1


async def deliver(outbox: Outbox, ref: HoldRef, api: ScriptedApi, progress: Progress | None = None) -> bool:
    delivery = Delivery(api, outbox, outbox.sender.incarnation, ref, Backoff(2.0, sleep=_no_sleep))
    delivery.progress = progress
    delivery.close()
    return await delivery.run()


async def _no_sleep(pause_s: float) -> None:
    assert 0 <= pause_s <= 2.0


async def test_all_is_sent_with_the_newest_progress_then_forgotten(outbox, ref):
    reports = [note(n) for n in range(450)]
    await outbox.add(ref, reports)
    api = ScriptedApi()

    assert await deliver(outbox, ref, api, Progress(step=7, loss=float("inf")))

    assert api.accepted == reports
    assert api.calls == 3
    assert api.progress == Progress(step=7, loss=float("inf"))
    assert await outbox.holds() == []


async def test_says_which_report_the_api_has(outbox, ref):
    assert await outbox.add(ref, [note(n) for n in range(3)]) == 3
    assert await outbox.add(ref, [note(n) for n in range(2)]) == 5
    delivery = Delivery(ScriptedApi(), outbox, outbox.sender.incarnation, ref)
    delivery.close()

    await delivery.run()

    assert delivery.sent_seq == 5


@settings(max_examples=30)
@given(
    script=st.lists(st.sampled_from(["ok", "away", "lost"]), max_size=40),
    poison=st.sets(st.integers(0, 29), max_size=4),
    most_per_batch=st.integers(1, 40),
)
async def test_whatever_fails_each_report_counts_once_in_order_and_only_poison_is_replaced(
    tmp_path_factory, script, poison, most_per_batch
):
    ref = HoldRef(operation_id=uuid4(), attempt=1)
    outbox = Outbox.create(tmp_path_factory.mktemp("outbox"), sender())
    await outbox.add(ref, [note(n) for n in range(30)])
    poisonous = {note(n) for n in poison}
    api = ScriptedApi(script, lambda report: report in poisonous, most_per_batch)

    assert await deliver(outbox, ref, api)

    assert len(api.accepted) == 30
    for n, report in enumerate(api.accepted):
        assert isinstance(report, Note)
        assert (report.message == str(n)) == (n not in poison)
    assert await outbox.holds() == []
    await outbox.aclose()


async def test_a_refused_report_becomes_a_note_that_says_which_and_why(outbox, ref):
    metrics = Metrics(series=[Series.of("loss", [(0, 1.0)])])
    await outbox.add(ref, [note("before"), metrics, note("after")])
    api = ScriptedApi(refuses=lambda report: isinstance(report, Metrics))

    assert await deliver(outbox, ref, api)

    before, instead, after = api.accepted
    assert (before, after) == (note("before"), note("after"))
    assert "kind metrics" in instead.message
    assert "no such value" in instead.message


async def test_a_refused_finish_stays_a_finish(outbox, ref):
    fault = Fault(code="exception", message="ValueError", details={"traceback": "unprintable"})
    await outbox.add(ref, [Finish(outcome=Outcome.FAILED, permanent=True, error=fault)])
    api = ScriptedApi(refuses=lambda report: isinstance(report, Finish) and bool(report.error.details))

    assert await deliver(outbox, ref, api)

    (finish,) = api.accepted
    assert (finish.outcome, finish.permanent) == (Outcome.FAILED, True)
    assert finish.error.code == "report_refused"


async def test_a_hold_whose_very_notes_are_refused_is_given_up(outbox, ref):
    await outbox.add(ref, [note("a")])

    assert not await deliver(outbox, ref, ScriptedApi(refuses=lambda report: True))


@pytest.mark.parametrize("code", [ErrorCode.FENCED, ErrorCode.NOT_FOUND])
async def test_nothing_more_is_sent_for_a_hold_that_has_ended(outbox, ref, code):
    await outbox.add(ref, [note("a"), note("b")])
    api = ScriptedApi(answer=OpsError(code, "over"))

    assert not await deliver(outbox, ref, api)

    assert api.calls == 1


async def test_an_api_that_lost_what_it_had_confirmed_ends_the_hold_with_a_clear_word(outbox, ref, caplog):
    await outbox.add(ref, [note(n) for n in range(10)])
    await outbox.drop(ref, 5)

    assert not await deliver(outbox, ref, ScriptedApi(answer=OpsError(ErrorCode.OUT_OF_ORDER, "a gap", last_seq=3)))

    assert "giving this attempt up: report 6 comes next" in caplog.text


async def test_goes_on_from_where_the_api_says(outbox, ref):
    reports = [note(n) for n in range(10)]
    await outbox.add(ref, reports)
    api = ScriptedApi(answer=OpsError(ErrorCode.OUT_OF_ORDER, "a gap", last_seq=4))
    api.accepted = reports[:4]

    class Once(ScriptedApi):
        async def send_reports(self, ref: HoldRef, body: str) -> int:
            try:
                return await super().send_reports(ref, body)
            finally:
                self.answer = None

    api.__class__ = Once

    assert await deliver(outbox, ref, api)

    assert api.accepted == reports

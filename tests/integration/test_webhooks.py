"""Ends are told at least once, signed, to whom they concern: real receivers, a real database, no clock waited for."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from unittest.mock import AsyncMock
from uuid import UUID, uuid4

import pytest

from helpers.receiver import Receiver, receiving
from helpers.store import Held, Store, losses, saved, started
from ops_backend import announcer as announcing
from ops_backend import webhooks as sending
from ops_backend.addresses import Names
from ops_backend.announcer import RETRIES_S, Announcer
from ops_backend.audit import Audit
from ops_backend.routes import webhooks as routes
from ops_backend.store import deletion, webhooks
from ops_backend.webhooks import WebhookSender, signature
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.history import EventView
from ops_contract.lifecycle import Outcome
from ops_contract.operations import OperationSummary
from ops_contract.reports import Fault, Progress
from ops_contract.webhooks import DeliveryView, WebhookBody, WebhookFormat, WebhookRequest, WebhookView

SENDER = WebhookSender(Names())
AUDIT = AsyncMock(Audit)
FAULT = Fault(code="oom", message="out of <memory> & *time* @everyone")


@pytest.fixture
async def receiver(store: Store) -> AsyncIterator[Receiver]:
    await store.worker(slots=20)
    async with receiving() as server:
        yield server


@pytest.fixture
def announcer(store: Store) -> Announcer:
    return Announcer(store.sessions, SENDER, 1.0)


async def add(store: Store, receiver: Receiver, **wish: Any) -> tuple[UUID, str]:
    request = WebhookRequest.model_validate({"url": receiver.url} | wish)
    made = await routes.add_webhook(request, store.sessions, "me", AUDIT, SENDER)
    return made.id, made.secret


async def turn(*announcers: Announcer) -> None:
    """Announce and send, each of them at once with the others, until every request is answered."""

    async def one(announcer: Announcer) -> None:
        async with asyncio.TaskGroup() as sends:
            await announcer.announce()
            await announcer.start_due(sends)

    await asyncio.gather(*map(one, announcers))


async def time_passes(store: Store) -> None:
    """Until every retry is due."""
    await store.execute("UPDATE deliveries SET next_try_at = now() - interval '1 s' WHERE state = 'due'")


async def listed(store: Store) -> list[WebhookView]:
    async with store.sessions.begin() as session:
        return (await webhooks.list_all(session)).items


async def deliveries(store: Store, id: UUID) -> list[DeliveryView]:
    async with store.sessions.begin() as session:
        return (await webhooks.deliveries(session, id)).items


async def completed(store: Store, **spec: Any) -> Held:
    return await store.finish(await store.running(**spec), Outcome.COMPLETED)


async def failed(store: Store, loss: float = 0.5, **spec: Any) -> Held:
    held = await store.running(**spec)
    progress = Progress(step=3, steps_total=9, loss=loss)
    held = await store.report(held, started(), losses((0, 1.0)), saved(held, 2), progress=progress)
    return await store.finish(held, Outcome.FAILED, permanent=True, error=FAULT)


def test_the_signature_is_that_of_the_published_example() -> None:
    secret, id, body = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxJek", b'{"test": 2432232314}'
    assert signature(secret, id, 1614265330, body) == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


async def test_an_end_is_told_once_with_the_operation_and_a_signature(
    store: Store, receiver: Receiver, announcer: Announcer
) -> None:
    id, secret = await add(store, receiver)
    held = await failed(store, loss=float("nan"), name="mine", labels={"team": "a"})

    await turn(announcer)
    await turn(announcer)

    [told] = receiver.received
    assert told.signed_by(secret)
    assert not told.signed_by(sending.new_secret())
    assert told.headers["content-type"] == "application/json"
    body = told.json
    assert (body["type"], body["data"]["status"], body["data"]["name"]) == ("operation.failed", "failed", "mine")
    assert (body["data"]["id"], body["data"]["labels"]) == (str(held.operation_id), {"team": "a"})
    assert body["data"]["progress"]["loss"] == "NaN"
    assert body["data"]["error"]["code"] == "oom"
    assert body["timestamp"] == body["data"]["ended_at"]
    assert WebhookBody.model_validate_json(told.body)
    [view] = await deliveries(store, id)
    assert (str(view.id), view.state, view.tries, view.http_status, view.answer) == (
        told.id, "delivered", 1, 200, "heard",
    )  # fmt: skip
    [hook] = await listed(store)
    assert (hook.last, hook.failures, hook.next_try_at) == (view, 0, None)


async def test_people_are_told_in_a_sentence_that_mentions_nobody(
    store: Store, receiver: Receiver, announcer: Announcer
) -> None:
    await add(store, receiver, format="slack")
    await add(store, receiver, format="discord")
    held = await failed(store, name="a<b>&@everyone_1")
    await store.finish(await store.running(name="x" * 200), Outcome.FAILED, permanent=True, error=LONG)

    await turn(announcer)

    short = str(held.operation_id)[:8]
    slack, discord = (
        next(r.json for r in receiver.received if kind in r.json and short in r.json[kind])
        for kind in ("text", "content")
    )
    assert slack["text"].startswith(f"a&lt;b&gt;&amp;@\u200beveryone_1 ({short}) failed after 0:0")
    assert "at step 3/9, loss 0.5: attempt 1 failed: out of &lt;memory&gt; &amp;" in slack["text"]
    assert slack["text"].endswith(f" Next: `ops logs {short}`, `ops resume {short}`")
    assert discord["allowed_mentions"] == {"parse": []}
    assert discord["content"].startswith(f"a\\<b\\>&@\u200beveryone\\_1 ({short}) failed")
    assert len(receiver.received) == 4
    assert all(len(r.json.get("text", r.json.get("content"))) <= 2000 for r in receiver.received)


LONG = Fault(code="oom", message="*" * 5000)


async def test_only_ends_that_are_wanted_are_told(store: Store, receiver: Receiver, announcer: Announcer) -> None:
    await failed(store)
    await turn(announcer)  # before there was a webhook
    wishes: dict[str, dict[str, Any]] = {
        "all": {},
        "failed": {"statuses": ["failed"]},
        "key": {"label": "team"},
        "value": {"label": "team=a=b"},
        "other": {"label": "team=a"},
    }
    ids = {name: (await add(store, receiver, **wish))[0] for name, wish in wishes.items()}
    await completed(store, labels={"team": "a=b"})
    await failed(store)
    pending = await store.submit()
    await store.cancel(pending)
    await store.running()

    await turn(announcer)

    told = {name: sorted(d.status for d in await deliveries(store, id)) for name, id in ids.items()}
    assert told == {
        "all": ["cancelled", "completed", "failed"],
        "failed": ["failed"],
        "key": ["completed"],
        "value": ["completed"],
        "other": [],
    }


async def test_a_resumed_one_ends_twice_and_each_is_told_as_it_was(
    store: Store, receiver: Receiver, announcer: Announcer
) -> None:
    await add(store, receiver)
    held = await failed(store)
    assert await store.resume(held.operation_id)
    await turn(announcer)  # it is pending again, without error or end
    claim = await store.claim()
    assert claim
    await store.finish(Held(held.operation_id, 2, claim.members[0].incarnation), Outcome.COMPLETED)
    await turn(announcer)

    first, second = (r.json["data"] for r in receiver.received)
    assert (first["status"], first["attempt"], first["error"]["code"]) == ("failed", 1, "oom")
    assert first["ended_at"]
    assert (second["status"], second["attempt"], second["error"]) == ("completed", 2, None)
    assert receiver.received[0].id != receiver.received[1].id


async def test_a_cancelled_one_is_told_when_it_has_stopped(
    store: Store, receiver: Receiver, announcer: Announcer
) -> None:
    await add(store, receiver)
    held = await store.running()
    await store.cancel(held.operation_id)
    await turn(announcer)
    assert not receiver.received

    await store.finish(held, Outcome.CANCELLED)
    await turn(announcer)
    assert [r.json["type"] for r in receiver.received] == ["operation.cancelled"]


async def test_what_is_not_taken_is_sent_again_with_its_id_until_it_is_given_up(
    store: Store, receiver: Receiver, announcer: Announcer
) -> None:
    id, secret = await add(store, receiver)
    receiver.answers += ["500 Sorry", "302 Found\r\nLocation: /elsewhere", "404 Not Found"] + ["503 Away"] * 10
    await completed(store)

    for number, retry_s in enumerate(RETRIES_S, 1):
        await turn(announcer)
        [view] = await deliveries(store, id)
        assert (view.state, view.tries) == ("due", number)
        assert view.next_try_at
        assert view.last_try_at
        assert 0.7 * retry_s < (view.next_try_at - view.last_try_at).total_seconds() < 1.3 * retry_s + 60
        await turn(announcer)  # not before
        assert len(receiver.received) == number
        await time_passes(store)
    await turn(announcer)

    [view] = await deliveries(store, id)
    assert (view.state, view.tries, view.http_status, view.next_try_at) == ("given_up", 8, 503, None)
    assert len({r.id for r in receiver.received}) == 1
    assert len({r.body for r in receiver.received}) == 1
    assert all(r.signed_by(secret) for r in receiver.received)
    assert (await listed(store))[0].failures == 1


async def test_a_redirect_is_not_followed_and_said(store: Store, receiver: Receiver, announcer: Announcer) -> None:
    id, _ = await add(store, receiver)
    receiver.answers += [f"307 Elsewhere\r\nLocation: {receiver.url}"]
    await completed(store)
    await turn(announcer)
    assert len(receiver.received) == 1
    [view] = await deliveries(store, id)
    assert (view.http_status, view.state) == (307, "due")
    assert receiver.url in view.answer


async def test_a_receiver_says_for_how_long_it_wants_to_be_left_alone(
    store: Store, receiver: Receiver, announcer: Announcer
) -> None:
    id, _ = await add(store, receiver)
    receiver.answers += [
        "429 Slow\r\nRetry-After: 600",
        "503 Slow\r\nRetry-After: 999999",
        "500 Slow\r\nRetry-After: soon",
    ]
    for _ in range(3):
        await completed(store)
        await turn(announcer)
    waits_s = {
        view.http_status: (view.next_try_at - view.last_try_at).total_seconds()
        for view in await deliveries(store, id)
        if view.next_try_at and view.last_try_at
    }
    assert 599 < waits_s[429] < 700
    assert 3599 < waits_s[503] < 3700  # within bounds
    assert 3 < waits_s[500] < 99


async def test_410_stops_a_webhook_and_gives_up_what_is_due_to_it(
    store: Store, receiver: Receiver, announcer: Announcer
) -> None:
    id, _ = await add(store, receiver)
    receiver.answers += ["500 Sorry", "410 Gone"]
    await completed(store)
    await turn(announcer)
    await completed(store)
    await turn(announcer)
    await completed(store)
    await time_passes(store)
    await turn(announcer)

    assert len(receiver.received) == 2
    assert [view.state for view in await deliveries(store, id)] == ["given_up", "given_up"]
    assert (await listed(store))[0].stopped_at


async def test_one_that_hangs_does_not_hold_up_the_others_and_is_tried_again(
    store: Store, receiver: Receiver, announcer: Announcer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcing, "SENDS", announcing.SENDS_A_WEBHOOK + 1)
    id, _ = await add(store, receiver)
    receiver.answers += [None] * 9
    async with receiving() as other:
        for _ in range(5):
            await completed(store)
        await announcer.announce()
        await add(store, other)
        async with asyncio.TaskGroup() as sends:
            await announcer.start_due(sends)
            await completed(store)
            await announcer.announce()
            await announcer.start_due(sends)
            await other.heard.wait()
            assert receiver.most == announcing.SENDS_A_WEBHOOK
            assert all(view.state == "due" for view in await deliveries(store, id))
            receiver.let_go.set()
    assert receiver.most == announcing.SENDS_A_WEBHOOK


async def test_who_says_nothing_in_time_has_not_taken_it(
    store: Store, receiver: Receiver, announcer: Announcer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "SEND_S", 0.05)
    id, _ = await add(store, receiver)
    receiver.answers += [None]
    await completed(store)
    await turn(announcer)
    [view] = await deliveries(store, id)
    assert (view.state, view.http_status, view.answer) == ("due", None, "no answer within 0.05 s")


async def test_backends_side_by_side_tell_each_end_once(store: Store, receiver: Receiver) -> None:
    id, _ = await add(store, receiver)
    backends = [Announcer(store.sessions, SENDER, 1.0) for _ in range(4)]
    ended = {str((await completed(store)).operation_id) for _ in range(8)}

    while len(receiver.received) < len(ended):
        await turn(*backends)

    assert {r.json["data"]["id"] for r in receiver.received} == ended
    assert len(receiver.received) == len(await deliveries(store, id)) == len(ended)


async def test_a_backend_that_died_between_sending_and_recording_leaves_it_to_be_sent_again(
    store: Store, receiver: Receiver, announcer: Announcer, monkeypatch: pytest.MonkeyPatch
) -> None:
    id, _ = await add(store, receiver)
    await completed(store)
    with monkeypatch.context() as patch:
        patch.setattr(webhooks, "record", Died())
        await turn(announcer)
    await turn(Announcer(store.sessions, SENDER, 1.0))  # its successor, at once
    assert len(receiver.received) == 1
    [view] = await deliveries(store, id)
    assert (view.state, view.tries) == ("due", 1)

    await time_passes(store)
    await turn(Announcer(store.sessions, SENDER, 1.0))
    assert [r.id for r in receiver.received] == [str(view.id)] * 2
    assert (await deliveries(store, id))[0].state == "delivered"


class Died:
    async def __call__(self, *_: Any) -> None:
        raise ConnectionError("the database is away")


async def test_one_that_cannot_be_told_holds_up_no_other(
    store: Store, receiver: Receiver, announcer: Announcer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add(store, receiver)
    first, second = await completed(store), await completed(store)

    def body(_format: WebhookFormat, operation: OperationSummary, _event: EventView) -> bytes:
        if operation.id == first.operation_id:
            raise ValueError("a defect")
        return str(operation.id).encode()

    monkeypatch.setattr(announcing, "ended_body", body)
    await turn(announcer)
    assert [r.body.decode() for r in receiver.received] == [str(second.operation_id)]


async def test_the_answer_of_an_overtaken_try_counts_for_nothing(store: Store, receiver: Receiver) -> None:
    id, _ = await add(store, receiver)
    await completed(store)
    async with store.sessions.begin() as session:
        await webhooks.announce(session)
        slow = await webhooks.claim_due(session, 30.0, [])
    await time_passes(store)
    async with store.sessions.begin() as session:
        assert await webhooks.claim_due(session, 30.0, [])
        answer, _ = await SENDER.send(slow.hook, slow.id, slow.at, b"{}")  # type: ignore[union-attr]
        assert await webhooks.record(session, slow, answer, None) is None  # type: ignore[arg-type]
    assert (await deliveries(store, id))[0].state == "due"


async def test_one_paused_past_its_claim_does_not_send(
    store: Store, receiver: Receiver, announcer: Announcer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcing, "SEND_S", 2 * announcing.CLAIM_S)
    await add(store, receiver)
    await completed(store)
    await turn(announcer)
    assert not receiver.received


async def test_deliveries_go_with_their_operation_or_webhook(
    store: Store, receiver: Receiver, announcer: Announcer
) -> None:
    id, _ = await add(store, receiver)
    other, _ = await add(store, receiver, format="slack")
    kept, gone = await completed(store), await completed(store)
    await announcer.announce()
    async with store.sessions.begin() as session:
        assert await deletion.delete_if_ended(session, gone.operation_id)
        await webhooks.remove(session, other)

    await turn(announcer)
    assert [r.json["data"]["id"] for r in receiver.received] == [str(kept.operation_id)]
    assert len(await deliveries(store, id)) == 1
    for call in (webhooks.remove, webhooks.deliveries, webhooks.find):
        with pytest.raises(OpsError, match="no webhook") as refused:
            async with store.sessions.begin() as session:
                await call(session, other)
        assert refused.value.code is ErrorCode.NOT_FOUND


async def test_a_deletion_and_an_announcement_of_it_at_once_do_not_fail(store: Store, receiver: Receiver) -> None:
    await add(store, receiver)
    for first in ("announce", "delete"):
        held = await completed(store)
        calls = {"announce": announce, "delete": lambda s, h=held: deletion.delete_if_ended(s, h.operation_id)}
        second = "delete" if first == "announce" else "announce"
        async with store.sessions.begin() as session:
            await calls[first](session)
            waiting = asyncio.create_task(in_transaction(store, calls[second]))
            if first == "announce":
                waits = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
                while not await store.fetch(waits):
                    pass
            else:
                await waiting
        await waiting
        assert not await store.fetch("SELECT 1 FROM deliveries")


async def announce(session: Any) -> object:
    return await webhooks.announce(session)


async def in_transaction(store: Store, call: Any) -> object:
    async with store.sessions.begin() as session:
        return await call(session)


async def test_old_deliveries_go_but_none_that_is_due(
    store: Store, receiver: Receiver, announcer: Announcer, monkeypatch: pytest.MonkeyPatch
) -> None:
    id, _ = await add(store, receiver)
    held = await completed(store)
    fill = """
        WITH more AS (
            INSERT INTO events (operation_id, seq, attempt, name, to_status, detail, announced)
            SELECT :id, 100 + n, 1, 'note', 'completed', '{}', true FROM generate_series(1, 1005) n RETURNING seq)
        INSERT INTO deliveries (id, webhook_id, operation_id, event_seq, state, created_at)
        SELECT gen_random_uuid(), :hook, :id, seq, CASE seq WHEN 101 THEN 'due' ELSE 'given_up' END,
               now() - make_interval(days => 2000 - seq) FROM more
    """
    await store.execute(fill, id=held.operation_id, hook=id)
    await announcer.announce()
    kept = await store.fetch("SELECT state, event_seq FROM deliveries ORDER BY event_seq")
    assert len(kept) == webhooks.KEPT + 1
    assert [tuple(row) for row in kept][:3] == [(kept[0].state, kept[0].event_seq), ("due", 101), ("given_up", 107)]


async def test_the_same_twice_is_refused_with_the_first(store: Store, receiver: Receiver) -> None:
    first, secret = await add(store, receiver, statuses=["failed", "completed"], label="a")
    with pytest.raises(OpsError, match=str(first)) as refused:
        await add(store, receiver, statuses=["completed", "failed"], label="a")
    assert (refused.value.code, refused.value.http_status) == (ErrorCode.WEBHOOK_EXISTS, 409)
    assert secret not in refused.value.message
    for other in ({"label": "b"}, {"format": "slack"}, {"statuses": ["failed"], "label": "a"}):
        await add(store, receiver, **other)


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data",
        "http://2852039166/",
        "http://0xa9.254.169.254/",
        "http://[fe80::1]/",
        "http://[::ffff:169.254.169.254]/",
        "http://[fd00:ec2::254]/",
        "https://100.100.100.200/",
    ],
)
async def test_metadata_addresses_are_refused_however_they_are_written(url: str) -> None:
    request = WebhookRequest.model_validate({"url": url})
    with pytest.raises(sending.Refused):
        await SENDER.check(str(request.url))
    hook = webhooks.Hook(uuid4(), str(request.url), request.format, sending.new_secret())
    answer, _ = await SENDER.send(hook, uuid4(), datetime.now(UTC), b"{}")
    assert (answer.delivered, answer.http_status) == (False, None)
    assert "link-local" in answer.answer


async def test_a_name_is_looked_up_once_and_sent_to_the_address_that_was_checked(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [["127.0.0.9", "127.0.0.1"], ["127.0.0.1", "169.254.169.254"]]  # nobody listens at the first

    def resolve(name: str, port: int | None, **_: Any) -> list[Any]:
        assert name == "hook.test"
        return [(0, 0, 0, "", (address, port)) for address in answers.pop(0)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    url = f"http://hook.test:{receiver.port}/hook"
    hook = webhooks.Hook(uuid4(), url, WebhookFormat.JSON, sending.new_secret())
    first, _ = await SENDER.send(hook, uuid4(), datetime.now(UTC), b"{}")
    second, _ = await SENDER.send(hook, uuid4(), datetime.now(UTC), b"{}")

    assert (first.delivered, second.delivered) == (True, False)
    [told] = receiver.received
    assert told.headers["host"] == f"hook.test:{receiver.port}"


async def test_a_proxy_of_the_environment_is_asked_for_names_only(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with receiving() as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("no_proxy", "inside.test")
        for url in ("http://outside.test/hook", receiver.url, "http://inside.test/hook"):
            hook = webhooks.Hook(uuid4(), url, WebhookFormat.JSON, sending.new_secret())
            answer, _ = await SENDER.send(hook, uuid4(), datetime.now(UTC), b"{}")
            assert answer.delivered is ("inside" not in url)
    assert [r.headers["host"] for r in proxy.received] == ["outside.test"]
    assert len(receiver.received) == 1


async def test_a_test_says_what_was_answered_and_is_no_delivery(store: Store, receiver: Receiver) -> None:
    for format, field in (("json", "type"), ("slack", "text"), ("discord", "content")):
        id, secret = await add(store, receiver, format=format)
        receiver.answers += ["200 OK", "403 Forbidden"]
        answers = [await routes.send_sample(id, store.sessions, "me", AUDIT, SENDER) for _ in range(2)]
        assert [(a.delivered, a.http_status, a.answer) for a in answers] == [
            (True, 200, "heard"),
            (False, 403, "heard"),
        ]
        assert receiver.received[-1].signed_by(secret)
        assert "test" in receiver.received[-1].json[field]
        assert not await deliveries(store, id)


async def test_the_secret_is_in_no_answer_but_the_first_and_in_no_log(
    store: Store, receiver: Receiver, announcer: Announcer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ops_backend")
    id, secret = await add(store, receiver)
    receiver.answers += ["500 Sorry"]
    await failed(store)
    await turn(announcer)
    said = " ".join([repr(await listed(store)), repr(await deliveries(store, id)), caplog.text])
    assert secret.removeprefix("whsec_") not in said
    assert receiver.url not in caplog.text  # of Slack it is a secret itself
    assert "try 1: 500; again in" in caplog.text
    assert any(getattr(record, "operation_id", None) for record in caplog.records)

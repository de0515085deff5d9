"""Output in the store: offsets that never mean two things, a bound, and no byte of an attempt that has ended."""

import pytest

from helpers.history import PRINTED_OVER
from helpers.store import Held, Store, at_once, held, losses
from ops_backend.store import output
from ops_backend.store.output import HEAD_BYTES, LATE_BYTES, Output
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.lifecycle import Outcome
from ops_contract.reports import LOG_CHUNK_BYTES, LogChunk

CHUNK = LOG_CHUNK_BYTES


@pytest.fixture
async def run(store: Store) -> Held:
    await store.worker("w-1", user_code=True)
    return await store.running(command=["train"], max_retries=5)


async def read(store: Store, run: Held, offset: int = 0, max_bytes: int = 2**20) -> Output:
    async with store.sessions.begin() as session:
        return await output.read(session, run.operation_id, offset, max_bytes)


async def again(store: Store, run: Held) -> Held:
    await store.finish(run, Outcome.FAILED)
    claim = await store.claim()
    assert claim is not None
    return held(claim)


async def test_an_offset_counts_all_that_was_printed_also_what_was_left_out(store: Store, run: Held) -> None:
    assert await read(store, run) == Output(0, b"", 0, False)

    run = await store.report(run, LogChunk.of(b"one\n"), losses((0, 1.0)), LogChunk.of(b"two\x00\xff\n", skipped=1000))

    assert await read(store, run) == Output(0, b"one\n", 1010, False), "it ends where something was left out"
    assert await read(store, run, 4) == Output(1004, b"two\x00\xff\n", 1010, False)
    assert await read(store, run, 1006, 2) == Output(1006, b"o\x00", 1010, False)
    assert await read(store, run, -3) == Output(1007, b"\x00\xff\n", 1010, False)
    assert (await read(store, run, -(10**6))).start == 0
    assert await read(store, run, 5000) == Output(1010, b"", 1010, False)


async def test_a_repeated_report_prints_nothing_twice(store: Store, run: Held) -> None:
    chunks = [LogChunk.of(b"one\n"), LogChunk.of(b"two\n")]

    await at_once(*(store.report(run, *chunks, seq=1) for _ in range(5)))
    await store.report(run, *chunks, LogChunk.of(b"three\n"), seq=1)

    assert (await read(store, run)).data == b"one\ntwo\nthree\n"


async def test_attempts_follow_one_another_and_a_line_says_where_they_meet(store: Store, run: Held) -> None:
    run = await store.report(run, LogChunk.of(b"no newline"))
    second = await again(store, run)
    third = await again(store, second)  # the second prints nothing

    await store.report(third, LogChunk.of(b"here again\n"), LogChunk.of(b"and on\n"))

    whole = b"no newline\n--- attempt 3 on w-1 ---\nhere again\nand on\n"
    assert await read(store, run) == Output(0, whole, len(whole), False)


async def test_the_line_says_from_which_step_an_attempt_goes_on(store: Store, run: Held) -> None:
    second = await again(store, run)
    await store.execute("UPDATE attempts SET start_step = 50 WHERE number = 2")

    await store.report(second, LogChunk.of(b"on"))

    assert (await read(store, run)).data == b"--- attempt 2 on w-1, from step 50 ---\non"


async def test_the_output_of_an_attempt_that_has_ended_is_refused(store: Store, run: Held) -> None:
    zombie = await store.report(run, LogChunk.of(b"mine\n"))
    await store.expire(zombie)
    await store.lose(zombie)
    second = await store.claim()
    assert second is not None
    await store.report(held(second), LogChunk.of(b"ours\n"))

    with pytest.raises(OpsError) as refused:
        await store.report(zombie, LogChunk.of(b"late\n"))

    assert refused.value.code is ErrorCode.FENCED
    assert (await read(store, run)).data == b"mine\n--- attempt 2 on w-1 ---\nours\n"


async def test_it_is_complete_once_the_operation_has_ended_and_all_is_read(store: Store, run: Held) -> None:
    run = await store.report(run, LogChunk.of(b"one\n"))
    assert not (await read(store, run)).complete
    run = await store.report(run, LogChunk.of(b"two\n", skipped=9))
    assert not (await read(store, run, 13)).complete
    await store.finish(run, Outcome.COMPLETED)

    assert not (await read(store, run)).complete
    assert not (await read(store, run, 13, 3)).complete
    assert (await read(store, run, 13)).complete


async def test_the_beginning_and_the_newest_are_kept_and_never_much_more(store: Store, run: Held) -> None:
    """A burst, then small pieces; the rows between go with the chunks that come."""
    chunks = (HEAD_BYTES + LATE_BYTES) // CHUNK + 40
    for first in range(0, chunks, 10):
        content = [bytes([number]) * CHUNK for number in range(first, first + 10)]
        run = await store.report(run, *(LogChunk.of(each, skipped=10**8) for each in content))
        [(kept_bytes,)] = await store.fetch("SELECT sum(octet_length(data)) FROM logs")
        assert kept_bytes <= HEAD_BYTES + LATE_BYTES + CHUNK

    part, kept = await read(store, run), []
    while part.data:
        assert part.start == 10**8 + part.data[0] * (10**8 + CHUNK)
        kept.append(part.data[0])
        part = await read(store, run, part.start + len(part.data))

    assert await store.fetch(PRINTED_OVER) == []
    head, late = HEAD_BYTES // CHUNK, LATE_BYTES // CHUNK
    assert kept == [*range(head), *range(chunks - late, chunks)]


async def test_a_body_has_its_bound_and_the_next_goes_on_from_there(store: Store, run: Held) -> None:
    whole = bytes(range(256)) * 1000
    run = await store.report(run, *(LogChunk.of(whole[n : n + 7000]) for n in range(0, len(whole), 7000)))

    got, part = b"", await read(store, run, max_bytes=10_000)
    while part.data:
        assert len(part.data) <= 10_000
        got += part.data
        part = await read(store, run, len(got), max_bytes=10_000)

    assert got == whole

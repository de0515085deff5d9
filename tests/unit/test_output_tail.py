"""What an agent passes on of a growing file: live, bounded, and no byte twice or in silence."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops_contract.reports import LOG_CHUNK_BYTES, LogChunk
from ops_worker import output
from ops_worker.output import HEAD_BYTES, LAG_BYTES, RATE_BYTES_S, UNSENT_BYTES, Budget, Tail, pass_on
from ops_worker.trainers import LOG_HEAD_BYTES

PLENTY = 2**40


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "0.log"
    path.touch()
    return path


def append(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)


def numbered(size_bytes: int, first: int = 0) -> bytes:
    """Every 16 bytes are found nowhere else."""
    return b"".join(b"%015d\n" % n for n in range(first // 16, (first + size_bytes) // 16))


def rebuilt(chunks: Sequence[LogChunk]) -> bytes:
    """With zeros for what was left out."""
    return b"".join(bytes(chunk.skipped) + chunk.content() for chunk in chunks)


def size_of(chunks: Sequence[LogChunk]) -> int:
    return sum(len(chunk.content()) for chunk in chunks)


def test_what_is_new_is_taken_once_whatever_it_is(log: Path) -> None:
    tail = Tail(log)
    append(log, "half a ü".encode()[:-1])
    first = tail.take(PLENTY)
    assert tail.take(PLENTY) == []
    append(log, "ü".encode()[1:] + b"\x00\xff\n")

    assert rebuilt([*first, *tail.take(PLENTY), *tail.rest()]) == "half a ü".encode() + b"\x00\xff\n"


def test_of_a_burst_the_beginning_and_the_end_are_taken_and_the_rest_is_counted(log: Path) -> None:
    whole = numbered(16 * 2**20)
    append(log, whole)

    chunks = [*Tail(log).rest()]

    assert size_of(chunks) == HEAD_BYTES + LAG_BYTES
    assert all(len(chunk.content()) <= LOG_CHUNK_BYTES for chunk in chunks)
    taken = rebuilt(chunks)
    assert len(taken) == len(whole)
    assert taken[:HEAD_BYTES] == whole[:HEAD_BYTES]
    assert taken[-LAG_BYTES:] == whole[-LAG_BYTES:]


def test_a_file_whose_middle_was_freed_gives_none_of_its_holes(log: Path) -> None:
    """`trim_log` frees between the first LOG_HEAD_BYTES and the newest ones."""
    with log.open("wb") as file:
        file.write(numbered(LOG_HEAD_BYTES))
        file.seek(70 * 2**20)
        file.write(numbered(LAG_BYTES))

    assert HEAD_BYTES <= LOG_HEAD_BYTES
    assert not any(b"\x00" in chunk.content() for chunk in Tail(log).rest())


def test_a_file_that_is_gone_or_empty_has_no_output(log: Path) -> None:
    tail = Tail(log)
    assert tail.take(PLENTY) == []
    log.unlink()
    assert tail.rest() == []


@settings(max_examples=60)
@given(
    turns=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=12),
    end=st.integers(0, 40),
)
def test_however_it_grows_the_beginning_and_the_end_are_whole_and_offsets_are_right(
    tmp_path_factory: pytest.TempPathFactory, turns: list[tuple[int, int]], end: int
) -> None:
    """In small: units of 16 bytes, the beginning and the lag 8 of them, a chunk 3."""
    log = tmp_path_factory.mktemp("log") / "0.log"
    log.touch()
    with pytest.MonkeyPatch.context() as patch:
        for name, units in (("HEAD_BYTES", 8), ("LAG_BYTES", 8), ("LOG_CHUNK_BYTES", 3)):
            patch.setattr(output, name, units * 16)
        tail, chunks, size = Tail(log), [], 0
        for grows, limit in turns:
            append(log, numbered(grows * 16, size))
            size += grows * 16
            took = tail.take(limit * 16)
            assert size_of(took) <= limit * 16
            chunks += took
        append(log, numbered(end * 16, size))
        chunks += tail.rest()

    whole, taken = log.read_bytes(), rebuilt(chunks)
    assert len(taken) == len(whole)
    assert (taken[:128], taken[-128:]) == (whole[:128], whole[-128:])
    left_out = [place for place in range(0, len(whole), 16) if not any(taken[place : place + 16])]
    assert all(taken[n : n + 16] == whole[n : n + 16] for n in range(0, len(whole), 16) if n not in left_out)
    assert len(left_out) * 16 == sum(chunk.skipped for chunk in chunks)


def test_the_budget_is_a_burst_then_a_rate_and_never_more_on_the_way_than_the_bound() -> None:
    budget = Budget()
    assert budget.left_bytes(0) == HEAD_BYTES

    budget.spend(HEAD_BYTES, last_seq=5)
    budget.earn(10.0)
    assert budget.left_bytes(4) == 0 == UNSENT_BYTES - HEAD_BYTES  # the API is away
    assert budget.left_bytes(5) == 10 * RATE_BYTES_S
    budget.earn(1e9)
    assert budget.left_bytes(5) == HEAD_BYTES


class Outbox:
    def __init__(self) -> None:
        self.chunks: list[LogChunk] = []
        self.stored = asyncio.Event()

    async def store(self, chunks: Sequence[LogChunk]) -> int:
        self.chunks += chunks
        if chunks:
            self.stored.set()
        return len(self.chunks)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "EVERY_S", 0.001)


async def passing(log: Path, outbox: Outbox, sent_seq: Callable[[], int]) -> tuple[asyncio.Event, asyncio.Task[None]]:
    ended = asyncio.Event()
    return ended, asyncio.create_task(pass_on(log, ended, outbox.store, sent_seq))


async def test_output_is_passed_on_while_the_process_lives_and_the_rest_at_its_end(log: Path, at_once: None) -> None:
    outbox = Outbox()
    ended, task = await passing(log, outbox, lambda: len(outbox.chunks))
    append(log, b"alive\n")
    await outbox.stored.wait()
    assert rebuilt(outbox.chunks) == b"alive\n"

    append(log, b"last words")
    ended.set()
    await task

    assert rebuilt(outbox.chunks) == b"alive\nlast words"


async def test_while_the_api_is_away_the_outbox_gets_a_bounded_part(log: Path, at_once: None) -> None:
    outbox, turns = Outbox(), asyncio.Semaphore(0)
    append(log, numbered(HEAD_BYTES))

    def nothing_sent() -> int:
        turns.release()
        return 0

    ended, task = await passing(log, outbox, nothing_sent)
    await outbox.stored.wait()
    append(log, numbered(8 * 2**20))
    for _ in range(10):
        await turns.acquire()
    assert size_of(outbox.chunks) == UNSENT_BYTES

    ended.set()
    await task

    assert size_of(outbox.chunks) == UNSENT_BYTES + LAG_BYTES
    assert rebuilt(outbox.chunks)[-LAG_BYTES:] == numbered(8 * 2**20)[-LAG_BYTES:]

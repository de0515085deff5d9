"""Stored operations, written by SQL: with attempts, holds and events, and of every tenth metrics and a checkpoint."""

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import asyncpg

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.databases import connect

FILL_AT_A_TIME = 20_000
POINTS_A_ROW = 50
JOB = json.dumps(
    {
        "kind": "training",
        "workload": "toy",
        "config": {"layers": 12, "width": 768, "dropout": 0.1, "data": "s3://somewhere/with/a/name"},
        "execution": {
            "accelerator": "cpu",
            "threads": 1,
            "max_epochs": 3,
            "learning_rate": 0.001,
            "batch_size": 32,
            "checkpoint_every": {"epochs": 1},
            "checkpoint_mode": "min",
            "checkpoint_save_top_k": 1,
            "checkpoint_save_last": True,
            "devices": 1,
        },
        "resources": {"cores": 1},
        "env": {},
    }
)
PAST_WORKERS = """
    INSERT INTO workers (incarnation, name, host, url, secret, workloads, versions, last_seen_at)
    SELECT md5('w' || n)::uuid, 'past-' || n, 'host-' || n % 50, 'http://127.0.0.1:1', 's', '{toy}', '{}',
           now() - interval '30 days'
      FROM generate_series(0, 999) n ON CONFLICT DO NOTHING
"""
# Every statement takes the numbers of the first and the last, and the job. Of ten operations eight completed.
FILL = (
    """
    INSERT INTO operations (id, name, kind, workload, job, labels, priority, max_retries, submitted_by, status, attempt,
                            event_seq, logged_event_seq, failures, created_at, started_at, ended_at)
    SELECT md5('o' || n)::uuid, 'train-' || n, 'training', 'toy', $3::text::jsonb,
           jsonb_build_object('team', 't' || n % 50, 'sweep', 's' || n / 100), 0, 3, 'user-' || n % 20,
           CASE n % 10 WHEN 0 THEN 'failed' WHEN 1 THEN 'cancelled' ELSE 'completed' END, 1, 3, 3,
           CASE n % 10 WHEN 0 THEN 1 ELSE 0 END,
           now() - interval '400 days' + n * interval '30 s', now() - interval '400 days' + n * interval '30 s',
           now() - interval '400 days' + n * interval '30 s' + interval '1 h'
      FROM generate_series($1::int, $2::int) n
    """,
    """
    INSERT INTO attempts (operation_id, number, incarnation, start_step, claimed_at, started_at, ended_at, outcome,
                          trainer_pid, environment, exactness)
    SELECT md5('o' || n)::uuid, 1, md5('w' || n % 1000)::uuid, 0, now() - interval '400 days' + n * interval '30 s',
           now() - interval '400 days' + n * interval '30 s',
           now() - interval '400 days' + n * interval '30 s' + interval '1 h',
           CASE n % 10 WHEN 0 THEN 'failed' WHEN 1 THEN 'cancelled' ELSE 'completed' END, 4711,
           '{"torch": "2.13.0", "python": "3.11.7", "device": "cpu", "threads": 1}',
           '{"promise": "promised", "reasons": []}'
      FROM generate_series($1::int, $2::int) n WHERE $3::text <> ''
    """,
    """
    INSERT INTO holds (operation_id, attempt, incarnation, lease_expires_at, last_seq, progress, first_step, last_step,
                       ended_at)
    SELECT md5('o' || n)::uuid, 1, md5('w' || n % 1000)::uuid, now() - interval '1 day', 12,
           '{"step": 1000, "steps_total": 1000, "epoch": 2, "loss": 0.125}', 1, 1000, now() - interval '1 day'
      FROM generate_series($1::int, $2::int) n WHERE $3::text <> ''
    """,
    """
    INSERT INTO events (operation_id, seq, at, attempt, name, from_status, to_status, detail, announced)
    SELECT md5('o' || n)::uuid, seq, now() - interval '400 days' + n * interval '30 s', least(seq - 1, 1),
           (ARRAY['submit', 'claim', CASE n % 10 WHEN 0 THEN 'fail' WHEN 1 THEN 'stop' ELSE 'complete' END])[seq],
           (ARRAY[NULL, 'pending', 'running'])[seq],
           (ARRAY['pending', 'running',
                  CASE n % 10 WHEN 0 THEN 'failed' WHEN 1 THEN 'cancelled' ELSE 'completed' END])[seq],
           '{}', seq = 3
      FROM generate_series($1::int, $2::int) n, generate_series(1, 3) seq WHERE $3::text <> ''
    """,
    """
    INSERT INTO checkpoints (id, operation_id, attempt, checkpoint_type, status, step, epoch, phase, path, size_bytes,
                             manifest_sha256, monitored)
    SELECT md5('c' || n)::uuid, md5('o' || n)::uuid, 1, 'periodic', 'committed', 1000, 2, 'update',
           md5('o' || n)::uuid || '/1-1000', 302000000, repeat('0', 64), 0.125
      FROM generate_series($1::int, $2::int, 10) n WHERE $3::text <> ''
    """,
)
# Of every tenth. They take the numbers of the first and the last, and how many rows of POINTS_A_ROW points each gets.
METRICS = """
    INSERT INTO metrics (operation_id, attempt, seq, name, first_step, steps, values)
    SELECT md5('o' || n)::uuid, 1, seq, 'loss', (seq - 2) * 50,
           ARRAY(SELECT generate_series((seq - 2) * 50, (seq - 1) * 50 - 1)),
           ARRAY(SELECT random() FROM generate_series(1, 50))
      FROM generate_series($1::int, $2::int, 10) n, generate_series(2, 1 + $3::int) seq
    """
# Each job another one, as in life: the plan of a claim remembers what it found for a job.
PENDING = """
    INSERT INTO operations (id, name, kind, workload, job, labels, priority, max_retries, submitted_by, status,
                            event_seq, created_at)
    SELECT md5('p' || n)::uuid, 'waits-' || n, 'training', 'toy',
           jsonb_set($2::text::jsonb, '{config,number}', to_jsonb(n)),
           '{}', 0, 3, 'me', 'pending', 1, now() - $3::interval + n * interval '10 ms'
      FROM generate_series(1, $1::int) n
"""


async def fill(url: str, stored: int, wanted: int, rows_of_points: int = 4) -> float:
    """As many more as there are to be; how long it took, seconds.

    Every tenth gets so many rows of POINTS_A_ROW points each.
    """
    began_s = time.monotonic()
    connection = await connect(url)
    # As if each had been checked when it was written: the rows fit together by how they are made.
    await connection.execute("SET session_replication_role = replica; SET synchronous_commit = off")
    await connection.execute(PAST_WORKERS)
    for first in range(stored, wanted, FILL_AT_A_TIME):
        last = min(wanted, first + FILL_AT_A_TIME) - 1
        for statement in FILL:
            await connection.execute(statement, first, last, JOB)
        await connection.execute(METRICS, first, last, rows_of_points)
    await connection.execute("VACUUM ANALYZE")  # as autovacuum would have
    await connection.execute("CHECKPOINT")
    await connection.close()
    return time.monotonic() - began_s


async def wait(connection: asyncpg.Connection, number: int, since: timedelta = timedelta(hours=1)) -> None:
    """So many that wait."""
    await connection.execute(PENDING, number, JOB, since)

"""Registration, heartbeats, and what workers offer."""

from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.claims import CLAIM_LOCK
from ops_backend.store.sql import IS_LIVE, plain, statement
from ops_contract.agents import CancelOrder, Heartbeat, HeartbeatAnswer, SlotOffer, WorkerRegistration
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.lifecycle import Drain
from ops_contract.tokens import token_digest

# The same incarnation again: its first answer may have been lost, or a backup was restored. Everybody can read who it
# is, so only its credential shows that it is the same. What it is stays as it was.
REGISTER = statement("""
    INSERT INTO workers (incarnation, name, host, url, secret, credential, token_id, workloads, user_code, versions)
    VALUES (:incarnation, :name, :host, :url, :secret, :credential, :token_id, :workloads, :user_code, :versions)
    ON CONFLICT (incarnation) DO UPDATE
       SET url = EXCLUDED.url, secret = EXCLUDED.secret, token_id = EXCLUDED.token_id,
           workloads = EXCLUDED.workloads, user_code = EXCLUDED.user_code, versions = EXCLUDED.versions,
           last_seen_at = now()
     WHERE (workers.credential, workers.name, workers.host) = (EXCLUDED.credential, EXCLUDED.name, EXCLUDED.host)
    RETURNING incarnation
""")

OFFER_SLOT = statement("""
    INSERT INTO slots (incarnation, index, device, device_uuid, cores, port)
    VALUES (:incarnation, :index, :device, :device_uuid, :cores, :port)
    ON CONFLICT (incarnation, index) DO NOTHING
""")

SLOTS = statement("SELECT index, device, device_uuid, cores, port FROM slots WHERE incarnation = :incarnation")

# Only what differs is written: ON CONFLICT locks the row even where its WHERE says no, and a fleet that starts at once
# would queue for it, each worker for as long as the one before it takes to commit.
OFFER_WORKLOAD = statement("""
    INSERT INTO workloads (name, title, config_schema, reports, validates)
    SELECT :name, :title, :config_schema, :reports, :validates
     WHERE NOT EXISTS (SELECT FROM workloads
                        WHERE name = :name AND title = :title AND validates = :validates
                          AND config_schema::text = CAST(:config_schema AS text)
                          AND reports::text = CAST(:reports AS text))
    ON CONFLICT (name) DO UPDATE
       SET title = EXCLUDED.title, config_schema = EXCLUDED.config_schema, reports = EXCLUDED.reports,
           validates = EXCLUDED.validates, updated_at = now()
""")

# Of two that register at once, the second sees the first.
LOCK_HOST = statement("SELECT pg_advisory_xact_lock(hashtextextended(:host, 0))")

# One that has said goodbye, and runs nothing any more, holds no device.
DEVICE_OWNER = statement(f"""
    SELECT w.name FROM slots s JOIN workers w USING (incarnation)
     WHERE w.host = :host AND s.device_uuid = ANY (:device_uuids) AND w.incarnation <> :incarnation
       AND {IS_LIVE}
       AND (NOT w.draining
            OR EXISTS (SELECT FROM holds h WHERE h.incarnation = w.incarnation AND h.ended_at IS NULL))
     LIMIT 1
""")

SEEN = statement("""
    UPDATE workers SET last_seen_at = now(), draining = :draining, devices = :devices
     WHERE incarnation = :incarnation AND secret <> ''
    RETURNING incarnation, drain
""")

# Waits for a claim that still sees the worker undrained: after the answer nothing more is claimed for it.
WAIT_FOR_CLAIMS = statement(f"SELECT pg_advisory_xact_lock({CLAIM_LOCK})")

DRAIN = statement("UPDATE workers SET drain = :drain WHERE incarnation = :incarnation RETURNING incarnation")

# Locked in the order in which every statement locks holds; the status is what this snapshot sees, the next beat's
# at the latest.
RENEW = statement("""
    WITH locked AS MATERIALIZED (
        SELECT h.operation_id, h.attempt
          FROM holds h JOIN unnest(:ids, :attempts) AS listed (operation_id, attempt) USING (operation_id, attempt)
         WHERE h.incarnation = :incarnation AND h.ended_at IS NULL
         ORDER BY h.operation_id, h.attempt
           FOR NO KEY UPDATE OF h
    ), renewed AS (
        UPDATE holds h SET lease_expires_at = now() + make_interval(secs => :lease_s)
          FROM locked
         WHERE h.operation_id = locked.operation_id AND h.attempt = locked.attempt AND h.incarnation = :incarnation
        RETURNING h.operation_id, h.attempt
    )
    SELECT r.operation_id, r.attempt, o.status, o.cancel_force, o.cancel_reason
      FROM renewed r JOIN operations o ON o.id = r.operation_id
""")


async def register(
    session: AsyncSession, worker: WorkerRegistration, lease_s: float, url: str, token_id: UUID | None = None
) -> None:
    """Write the worker, its slots and workloads. `url` is where it is called; `token_id` the token that it ends with.

    Raises 409 `incarnation_taken` without the credential, name, host and slots that it registered with before, and
    `device_taken` when a live incarnation on the same host holds one of its devices.
    """
    await _refuse_taken_devices(session, worker, lease_s)
    row = worker.model_dump(include={"incarnation", "name", "host", "secret", "user_code", "versions"})
    row |= {"workloads": [w.name for w in worker.workloads], "credential": token_digest(worker.credential)}
    known = await session.scalar(REGISTER, row | {"url": url, "token_id": token_id})
    slots = {SlotOffer(**row._mapping) for row in await session.execute(SLOTS, {"incarnation": worker.incarnation})}
    if known is None or slots not in (set(), set(worker.slots)):
        raise OpsError(ErrorCode.INCARNATION_TAKEN, "this incarnation is another worker's: start anew, under a new one")
    await session.execute(OFFER_SLOT, [{"incarnation": worker.incarnation} | s.model_dump() for s in worker.slots])
    # In one order, so that two workers that register at once do not deadlock.
    for offer in sorted(worker.workloads, key=lambda w: w.name):
        await session.execute(OFFER_WORKLOAD, offer.model_dump())


async def heartbeat(session: AsyncSession, incarnation: UUID, beat: Heartbeat, lease_s: float) -> HeartbeatAnswer:
    """Renew what it lists; say what of that has ended and what has to stop. Raises 404 for an unknown worker."""
    now = {"draining": beat.draining, "devices": [plain(device) for device in beat.devices]}
    seen = (await session.execute(SEEN, {"incarnation": incarnation} | now)).one_or_none()
    if seen is None:
        raise OpsError(ErrorCode.NOT_FOUND, "this worker is not registered: register again")
    rows = (await session.execute(RENEW, _listed(beat) | {"incarnation": incarnation, "lease_s": lease_s})).all()
    alive = {(row.operation_id, row.attempt) for row in rows}
    return HeartbeatAnswer(
        ended=[hold for hold in beat.holds if (hold.operation_id, hold.attempt) not in alive],
        cancelling=[
            CancelOrder(
                operation_id=row.operation_id,
                attempt=row.attempt,
                reason=row.cancel_reason or "",
                force=row.cancel_force,
            )
            for row in rows
            if row.status == "cancelling"
        ],
        drain=seen.drain,
    )


async def drain(session: AsyncSession, incarnation: UUID, wish: Drain | None) -> None:
    """None ends it. Raises 404 for an unknown worker; one that is gone may come back, and finds the wish."""
    await session.execute(WAIT_FOR_CLAIMS)
    if await session.scalar(DRAIN, {"incarnation": incarnation, "drain": wish}) is None:
        raise OpsError(ErrorCode.NOT_FOUND, f"no worker {incarnation}; GET /workers lists them")


def _listed(beat: Heartbeat) -> dict[str, Any]:
    return {"ids": [h.operation_id for h in beat.holds], "attempts": [h.attempt for h in beat.holds]}


async def _refuse_taken_devices(session: AsyncSession, worker: WorkerRegistration, lease_s: float) -> None:
    uuids = [slot.device_uuid for slot in worker.slots if slot.device_uuid]
    if not uuids:
        return
    await session.execute(LOCK_HOST, {"host": worker.host})
    values = {"host": worker.host, "device_uuids": uuids, "incarnation": worker.incarnation, "lease_s": lease_s}
    owner = await session.scalar(DEVICE_OWNER, values)
    if owner is not None:
        raise OpsError(
            ErrorCode.DEVICE_TAKEN,
            f"the live worker {owner!r} holds one of these devices; stop it, wait until its lease has run out, or give "
            "this one other GPUs by OPS_GPUS",
        )

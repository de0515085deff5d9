"""The schema as SQLAlchemy sees it. The migrations make it; `alembic check` holds the two together."""

from collections.abc import Iterable
from enum import StrEnum

from sqlalchemy import (
    ARRAY,
    JSON,
    TIMESTAMP,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from ops_contract.audit import Action
from ops_contract.energy import Use
from ops_contract.lifecycle import (
    LIVE,
    CheckpointStatus,
    CheckpointType,
    Event,
    Kind,
    Outcome,
    Phase,
    Status,
    StudyPhase,
)
from ops_contract.tokens import Scope
from ops_contract.webhooks import DeliveryState, WebhookFormat

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def quoted(words: Iterable[str]) -> str:
    """As they stand in `IN (…)`."""
    return ", ".join(f"'{word}'" for word in words)


def one_of(column: str, words: type[StrEnum]) -> CheckConstraint:
    """The column holds a word of the enum (or null, where it may)."""
    return CheckConstraint(f"{column} IN ({quoted(words)})", name=column)


def _instant(name: str, *, default_now: bool = False, nullable: bool = True) -> Column[object]:
    return Column(
        name, TIMESTAMP(timezone=True), nullable=nullable, server_default=text("now()") if default_now else None
    )


def _count(name: str) -> Column[int]:
    return Column(name, Integer, nullable=False, server_default=text("0"))


def _flag(name: str) -> Column[bool]:
    return Column(name, Boolean, nullable=False, server_default=text("false"))


# All that decides what an operation fits: what `store.placement` reads in `runs`, `suits`, `room` and `PLACED` has
# to be in it. Null of what does not wait: a condition on it is one that no other index can serve, whatever the
# planner believes of how many wait. Ordered by bytes: new rules of sorting of an operating system break no such index.
WISH = """((CASE WHEN status = 'pending' THEN
    CASE WHEN kind IN ('study', 'training') THEN left(kind, 1) ELSE '' END
    || ' ' || coalesce(job->'resources'->>'cores', '') || ' ' || coalesce(job->'resources'->>'nodes', '')
    || ' ' || coalesce(job->'execution'->>'accelerator', '') || ' ' || coalesce(job->'execution'->>'devices', '')
    || ' ' || coalesce(job->'execution'->>'threads', '')
    || CASE WHEN coalesce(job->'env', '{}') = '{}' THEN ' ' ELSE ' env ' END
    || CASE WHEN workload = 'command' OR workload LIKE '%:%' THEN ':' ELSE workload END
END) COLLATE "C")"""

operations = Table(
    "operations",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("workload", Text, nullable=False),
    Column("job", JSONB, nullable=False),
    Column("labels", JSONB, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("max_retries", Integer, nullable=False),
    Column("submitted_by", Text, nullable=False),
    Column("idempotency_key", Text),
    Column("body_sha256", Text),
    Column("status", Text, nullable=False),
    _count("attempt"),
    _count("event_seq"),
    # The files in logs/ are of this event; null when there are none yet.
    Column("logged_event_seq", Integer),
    _count("failures"),
    _count("lost_without_progress"),
    _instant("not_before"),
    # Chosen by a resume; cleared when the resumed attempt commits a checkpoint of its own.
    Column("resume_checkpoint_id", Uuid, ForeignKey("checkpoints.id", use_alter=True)),
    _flag("resume_explicit"),
    # Of code and data, by a resume or a fork; cleared with the choice.
    _flag("accept_changes"),
    # Another operation's: where the lineage of a fork begins. It is needed as long as this row is.
    Column("forked_from_checkpoint_id", Uuid, ForeignKey("checkpoints.id", use_alter=True)),
    Column("code_sha256", Text, ForeignKey("snapshots.sha256")),
    # Whose values it is compared with; null for what is no replay.
    Column("replay_of", Uuid, ForeignKey("operations.id")),
    # Of a study: what its next attempt does.
    Column("phase", Text),
    # Of a child: its study, what decides its result, and the attempt of the study whose plan it runs for.
    Column("parent_id", Uuid, ForeignKey("operations.id")),
    Column("child_key", Text),
    Column("planned_attempt", Integer),
    _flag("cancel_force"),
    Column("cancel_reason", Text),
    _flag("exit_unconfirmed"),
    Column("error", JSONB),
    _instant("created_at", default_now=True, nullable=False),
    _instant("started_at"),
    _instant("ended_at"),
    UniqueConstraint("submitted_by", "idempotency_key"),
    one_of("status", Status),
    one_of("kind", Kind),
    one_of("phase", StudyPhase),
)
Index("ix_operations_newest", operations.c.created_at.desc(), operations.c.id.desc())
Index(
    "ix_operations_queue",
    operations.c.priority.desc(),
    operations.c.created_at,
    operations.c.id,
    postgresql_where=operations.c.status == text("'pending'"),
)
# The claim asks for the first of each wish at every turn: it must not walk the queue for them.
Index(
    "ix_operations_wish",
    text(WISH),
    operations.c.priority.desc(),
    operations.c.created_at,
    operations.c.id,
    postgresql_where=text(f"{WISH} IS NOT NULL"),
)
# Lists, newest first. Of what completed there is always some; of all else there may be one among a million.
Index(
    "ix_operations_by_status",
    operations.c.status,
    operations.c.created_at.desc(),
    operations.c.id.desc(),
    postgresql_where=operations.c.status != text("'completed'"),
)
Index("ix_operations_by_workload", operations.c.workload, operations.c.created_at.desc(), operations.c.id.desc())
Index("ix_operations_by_user", operations.c.submitted_by, operations.c.created_at.desc(), operations.c.id.desc())
Index("ix_operations_labels", operations.c.labels, postgresql_using="gin")
Index(
    "ix_operations_forked_from",
    operations.c.forked_from_checkpoint_id,
    postgresql_where=operations.c.forked_from_checkpoint_id.is_not(None),
)
Index("ix_operations_code", operations.c.code_sha256, postgresql_where=operations.c.code_sha256.is_not(None))
Index("ix_operations_replay_of", operations.c.replay_of, postgresql_where=operations.c.replay_of.is_not(None))
Index(
    "ix_operations_children",
    operations.c.parent_id,
    operations.c.child_key,
    unique=True,
    postgresql_where=operations.c.parent_id.is_not(None),
)
Index(
    "ix_operations_live_children",
    operations.c.parent_id,
    postgresql_where=text(f"parent_id IS NOT NULL AND status IN ({quoted(sorted(LIVE))})"),
)
Index(
    "ix_operations_unended_studies",
    operations.c.id,
    postgresql_where=text("kind = 'study' AND status IN ('waiting', 'cancelling')"),
)
Index(
    "ix_operations_unlogged",
    operations.c.id,
    postgresql_where=text(
        "status IN ('completed', 'failed', 'cancelled') AND logged_event_seq IS DISTINCT FROM event_seq"
    ),
)
Index(
    "ix_operations_resume_choice",
    operations.c.resume_checkpoint_id,
    postgresql_where=operations.c.resume_checkpoint_id.is_not(None),
)

# What a study's attempts wanted: the newest attempt that planned a child decides. It is the study's alone, so that
# parent and child never lock each other's rows.
planned = Table(
    "planned",
    metadata,
    Column("parent_id", Uuid, ForeignKey("operations.id"), primary_key=True),
    Column("child_key", Text, primary_key=True),
    Column("attempt", Integer, nullable=False),
    Column("position", Integer, nullable=False),
    # Where the child stands in the study.
    Column("about", JSON, nullable=False),  # not jsonb: a point keeps the order it was written in
)

# What an operation comes to, of its newest attempt that said so.
results = Table(
    "results",
    metadata,
    Column("operation_id", Uuid, ForeignKey("operations.id"), primary_key=True),
    Column("attempt", Integer, nullable=False),
    Column("content", JSON, nullable=False),
    _instant("created_at", default_now=True, nullable=False),
)

# A project as it was submitted. Here and not in files: it is small, and the row that refers to it keeps it.
snapshots = Table(
    "snapshots",
    metadata,
    Column("sha256", Text, primary_key=True),  # of the archive
    Column("archive", LargeBinary, nullable=False),
    _instant("created_at", default_now=True, nullable=False),
)

workers = Table(
    "workers",
    metadata,
    Column("incarnation", Uuid, primary_key=True),
    Column("name", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("url", Text, nullable=False),
    # What the backend shows the worker, as it is; what the worker shows the backend, by its digest.
    Column("secret", Text, nullable=False),
    Column("credential", LargeBinary),
    # By which it registered; null: by the service's own.
    Column("token_id", Uuid, ForeignKey("tokens.id")),
    Column("workloads", ARRAY(Text), nullable=False),
    # Runs commands, and workloads that users bring.
    _flag("user_code"),
    Column("versions", JSONB, nullable=False),
    # Its GPUs as its last heartbeat told them.
    Column("devices", JSONB, nullable=False, server_default=text("'[]'")),
    # What it says of itself, and what an operator wishes: neither overwrites the other.
    _flag("draining"),
    Column("drain", Text),
    _instant("registered_at", default_now=True, nullable=False),
    _instant("last_seen_at", default_now=True, nullable=False),
    CheckConstraint("drain IN ('finish', 'preempt')", name="drain"),
)
Index("ix_workers_credential", workers.c.credential, unique=True)

slots = Table(
    "slots",
    metadata,
    Column("incarnation", Uuid, ForeignKey("workers.incarnation"), primary_key=True),
    Column("index", Integer, primary_key=True),
    Column("device", Text, nullable=False),
    Column("device_uuid", Text),
    Column("cores", Integer, nullable=False),
    # Where its trainer listens when it is rank 0 of a gang, on the host of the worker's URL.
    Column("port", Integer),
    # Whom it was given to last. It is taken while that hold lives, so ending a hold is all it takes to free it.
    Column("operation_id", Uuid),
    Column("attempt", Integer),
    _instant("rests_until"),
    CheckConstraint("device IN ('cpu', 'cuda', 'mps')", name="device"),
)

workloads = Table(
    "workloads",
    metadata,
    Column("name", Text, primary_key=True),
    Column("title", Text, nullable=False),
    Column("config_schema", JSON, nullable=False),  # not jsonb: its fields keep the order they were written in
    Column("reports", JSON, nullable=False),  # the first metric is the one that is monitored by default
    # Its config is checked by code too: only a worker can say whether it is right.
    _flag("validates"),
    _instant("updated_at", default_now=True, nullable=False),
)

attempts = Table(
    "attempts",
    metadata,
    Column("operation_id", Uuid, ForeignKey("operations.id"), primary_key=True),
    Column("number", Integer, primary_key=True),
    # Of a gang: the leader, which has rank 0.
    Column("incarnation", Uuid, ForeignKey("workers.incarnation"), nullable=False),
    # What it started from; null as well when that has been deleted since.
    Column("checkpoint_id", Uuid, ForeignKey("checkpoints.id", ondelete="SET NULL", use_alter=True)),
    Column("start_step", BigInteger, nullable=False),
    # It began at the evaluation after that step's update, which is not done again.
    _flag("starts_at_evaluation"),
    _instant("claimed_at", default_now=True, nullable=False),
    _instant("started_at"),
    _instant("ended_at"),
    Column("outcome", Text),
    Column("error", JSONB),
    Column("trainer_pid", Integer),
    Column("environment", JSONB),
    Column("exactness", JSONB),
    Column("replay", JSONB),
    one_of("outcome", Outcome),
)

Index("ix_attempts_started", attempts.c.started_at.desc(), postgresql_where=attempts.c.started_at.is_not(None))
Index("ix_attempts_checkpoint", attempts.c.checkpoint_id, postgresql_where=attempts.c.checkpoint_id.is_not(None))

# One for each worker of an attempt: of a gang there are several.
holds = Table(
    "holds",
    metadata,
    Column("operation_id", Uuid, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("incarnation", Uuid, ForeignKey("workers.incarnation"), primary_key=True),
    # Renewed every few seconds: no index may name it or its neighbours, so that updates stay HOT.
    _instant("lease_expires_at", nullable=False),
    Column("last_seq", BigInteger, nullable=False, server_default=text("0")),
    Column("progress", JSONB),
    Column("first_step", BigInteger),
    Column("last_step", BigInteger),
    # The newest step it has committed a checkpoint of. Kept here because what ends the attempt locks this row: rows
    # of `checkpoints` that were committed while it waited for the lock are not in its snapshot.
    Column("checkpoint_step", BigInteger),
    # The ranks that run there: so many, from the first one on.
    _count("first_rank"),
    Column("ranks", Integer, nullable=False, server_default=text("1")),
    # As its own finish told it; null where another member's end was its too.
    Column("outcome", Text),
    _instant("ended_at"),
    ForeignKeyConstraint(["operation_id", "attempt"], ["attempts.operation_id", "attempts.number"]),
    postgresql_with={"fillfactor": "50"},
)
Index("ix_holds_live", holds.c.operation_id, postgresql_where=holds.c.ended_at.is_(None))

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("operation_id", Uuid, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("checkpoint_type", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("phase", Text, nullable=False),
    Column("path", Text, nullable=False, unique=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("manifest_sha256", Text, nullable=False),
    Column("monitored", Double),
    # Retention leaves it alone while this is set.
    _instant("pinned_at"),
    _instant("created_at", default_now=True, nullable=False),
    ForeignKeyConstraint(["operation_id", "attempt"], ["attempts.operation_id", "attempts.number"]),
    one_of("checkpoint_type", CheckpointType),
    one_of("status", CheckpointStatus),
    one_of("phase", Phase),
)
Index("ix_checkpoints_newest", checkpoints.c.operation_id, checkpoints.c.step.desc())
Index("ix_checkpoints_pinned", checkpoints.c.id, postgresql_where=checkpoints.c.pinned_at.is_not(None))
Index("ix_checkpoints_deleting", checkpoints.c.id, postgresql_where=checkpoints.c.status == text("'deleting'"))

artifacts = Table(
    "artifacts",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("operation_id", Uuid, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("name", Text, nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("path", Text, nullable=False, unique=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("sha256", Text, nullable=False),
    _instant("created_at", default_now=True, nullable=False),
    # One of a name: a later attempt's takes the place of what an attempt left that did not complete.
    UniqueConstraint("operation_id", "name"),
    ForeignKeyConstraint(["operation_id", "attempt"], ["attempts.operation_id", "attempts.number"]),
)

metrics = Table(
    "metrics",
    metadata,
    Column("operation_id", Uuid, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    # The number of the report that brought it: in this order a reader misses nothing, which steps do not promise.
    Column("seq", BigInteger, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("first_step", BigInteger, nullable=False),
    # Arrays, not a row a point: 14 bytes a point instead of 206.
    Column("steps", ARRAY(BigInteger), nullable=False),
    Column("values", ARRAY(Double), nullable=False),
    ForeignKeyConstraint(["operation_id", "attempt"], ["attempts.operation_id", "attempts.number"]),
)
Index("ix_metrics_curve", metrics.c.operation_id, metrics.c.name, metrics.c.attempt, metrics.c.first_step)

# What one device used between two marks of an attempt (`EnergyWindow`), in whole microjoules and microseconds: sums of
# them are exact, in whatever order they came.
energy_windows = Table(
    "energy_windows",
    metadata,
    Column("operation_id", Uuid, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("incarnation", Uuid, primary_key=True),
    Column("device", Text, primary_key=True),
    Column("index", BigInteger, primary_key=True),
    # "none" of what no meter measured.
    Column("source", Text, nullable=False),
    Column("quality", Text, nullable=False),
    Column("use", Text, nullable=False),
    Column("epoch", BigInteger),
    Column("first_step", BigInteger, nullable=False),
    Column("until_step", BigInteger, nullable=False),
    Column("units", BigInteger, nullable=False),
    Column("duration_us", BigInteger, nullable=False),
    Column("energy_uj", BigInteger),
    Column("error_uj", BigInteger),
    Column("reason", Text),
    Column("baseline_w", Double),
    Column("state", JSONB),
    CheckConstraint("(energy_uj IS NULL) = (reason IS NOT NULL)", name="unknown_has_its_reason"),
    ForeignKeyConstraint(["operation_id", "attempt"], ["attempts.operation_id", "attempts.number"]),
    one_of("use", Use),
)
# What a later attempt does again is found by it; all else is in the sums.
Index(
    "ix_energy_windows_training",
    energy_windows.c.operation_id,
    energy_windows.c.attempt,
    energy_windows.c.until_step,
    postgresql_where=text("use IN ('train', 'evaluate')"),
)

# Of the same windows, moved by the statement that inserts them.
energy_sums = Table(
    "energy_sums",
    metadata,
    Column("operation_id", Uuid, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("incarnation", Uuid, primary_key=True),
    Column("device", Text, primary_key=True),
    Column("source", Text, primary_key=True),
    Column("quality", Text, primary_key=True),
    Column("use", Text, primary_key=True),
    Column("windows", BigInteger, nullable=False),
    # How many of them have no energy, and no error.
    Column("unknown", BigInteger, nullable=False),
    Column("without_error", BigInteger, nullable=False),
    Column("energy_uj", BigInteger, nullable=False),
    Column("error_uj", BigInteger, nullable=False),
    Column("duration_us", BigInteger, nullable=False),
    Column("steps", BigInteger, nullable=False),
    Column("units", BigInteger, nullable=False),
    Column("reason", Text),
    ForeignKeyConstraint(["operation_id", "attempt"], ["attempts.operation_id", "attempts.number"]),
    one_of("use", Use),
)

# What the attempts print. Offsets count all of it, in order; `stored` what was stored before the row.
logs = Table(
    "logs",
    metadata,
    Column("operation_id", Uuid, primary_key=True),
    Column("start", BigInteger, primary_key=True),
    Column("stored", BigInteger, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("data", LargeBinary, nullable=False),
    UniqueConstraint("operation_id", "stored"),
    ForeignKeyConstraint(["operation_id", "attempt"], ["attempts.operation_id", "attempts.number"]),
)

events = Table(
    "events",
    metadata,
    Column("operation_id", Uuid, ForeignKey("operations.id"), primary_key=True),
    Column("seq", Integer, primary_key=True),
    _instant("at", default_now=True, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("name", Text, nullable=False),
    Column("from_status", Text),
    Column("to_status", Text, nullable=False),
    Column("detail", JSONB, nullable=False),
    # An end of which there are deliveries to all webhooks that want it; of other events it says nothing.
    _flag("announced"),
    one_of("name", Event),
    one_of("from_status", Status),
    one_of("to_status", Status),
)
Index(
    "ix_events_unannounced",
    events.c.at,
    postgresql_where=text(
        "NOT announced AND from_status <> to_status AND to_status IN ('completed', 'failed', 'cancelled')"
    ),
)

webhooks = Table(
    "webhooks",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("url", Text, nullable=False),
    Column("format", Text, nullable=False),
    Column("statuses", ARRAY(Text), nullable=False),  # sorted, so that equal ones are equal
    Column("label", Text, nullable=False),  # empty: any
    Column("description", Text, nullable=False),
    # As it is: it is needed to sign.
    Column("secret", Text, nullable=False),
    _instant("created_at", default_now=True, nullable=False),
    # Its receiver is gone for good.
    _instant("stopped_at"),
    UniqueConstraint("url", "format", "statuses", "label"),
    one_of("format", WebhookFormat),
)

# One for each end and webhook. They go with either.
deliveries = Table(
    "deliveries",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("webhook_id", Uuid, ForeignKey("webhooks.id", ondelete="CASCADE"), nullable=False),
    Column("operation_id", Uuid, nullable=False),
    Column("event_seq", Integer, nullable=False),
    Column("state", Text, nullable=False, server_default=text("'due'")),
    # Number of the newest try: only that one may record its answer.
    _count("tries"),
    _instant("next_try_at", default_now=True),
    _instant("last_try_at"),
    Column("http_status", Integer),
    Column("answer", Text, nullable=False, server_default=text("''")),
    _instant("created_at", default_now=True, nullable=False),
    UniqueConstraint("operation_id", "event_seq", "webhook_id"),
    ForeignKeyConstraint(["operation_id", "event_seq"], ["events.operation_id", "events.seq"], ondelete="CASCADE"),
    one_of("state", DeliveryState),
)
Index("ix_deliveries_due", deliveries.c.next_try_at, postgresql_where=deliveries.c.state == text("'due'"))
Index("ix_deliveries_newest", deliveries.c.webhook_id, deliveries.c.created_at.desc(), deliveries.c.id.desc())

# Of each operation that was deleted, for good: who still writes in its directory is found by it.
deletions = Table(
    "deletions",
    metadata,
    Column("operation_id", Uuid, primary_key=True),
    _instant("deleted_at", default_now=True, nullable=False),
    # Null: its files are still to go.
    _instant("swept_at"),
)
Index("ix_deletions_unswept", deletions.c.operation_id, postgresql_where=deletions.c.swept_at.is_(None))

# Revoked ones stay: the audit names them.
tokens = Table(
    "tokens",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", Text, nullable=False),
    Column("scope", Text, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("created_by", Text, nullable=False),
    _instant("created_at", default_now=True, nullable=False),
    _instant("expires_at"),
    _instant("last_used_at"),
    _instant("revoked_at"),
    UniqueConstraint("digest"),
    one_of("scope", Scope),
)
Index("ix_tokens_name", tokens.c.name, unique=True, postgresql_where=tokens.c.revoked_at.is_(None))

# No foreign keys: what it tells of may be deleted.
audit = Table(
    "audit",
    metadata,
    Column("id", Uuid, primary_key=True),
    _instant("at", default_now=True, nullable=False),
    Column("who", Text),
    Column("token_id", Uuid),
    Column("action", Text, nullable=False),
    Column("target", Text),
    Column("address", Text, nullable=False),
    Column("user_agent", Text),
    Column("count", Integer, nullable=False, server_default=text("1")),
    Column("detail", JSONB, nullable=False),
    one_of("action", Action),
)
Index("ix_audit_newest", audit.c.at.desc(), audit.c.id.desc())

# Codes that log a browser in, and browsers that are logged in. The secrets themselves are with their holders alone.
logins = Table(
    "logins",
    metadata,
    Column("digest", LargeBinary, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("submitter", Text, nullable=False),
    # By which it was made, and with which it ends; null: OPS_API_TOKEN.
    Column("token_id", Uuid, ForeignKey("tokens.id")),
    _instant("created_at", default_now=True, nullable=False),
    _instant("expires_at", nullable=False),
    CheckConstraint("kind IN ('link', 'session')", name="kind"),
)

# Of schedulers that were asked to start workers. No foreign key: a job that is still to end outlives its operation.
engine_jobs = Table(
    "engine_jobs",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("operation_id", Uuid, nullable=False),
    # Of the operation, when the job was asked for: none was begun on the job while it is the same.
    Column("attempt", Integer, nullable=False),
    Column("engine", Text, nullable=False),
    # Null until the scheduler has said it; then the row is found by its name.
    Column("external_id", Text),
    Column("name", Text, nullable=False),
    Column("request", JSONB, nullable=False),
    Column("state", Text, nullable=False, server_default=text("'intended'")),
    # What the scheduler said last: its own word, and why.
    Column("engine_state", Text),
    Column("reason", Text),
    # How many jobs in a row, this one among them, ended before they were of use to the operation.
    _count("failures"),
    _instant("created_at", default_now=True, nullable=False),
    _instant("submitted_at"),
    # Since when it is known to wait for so long that its operation was told.
    _instant("warned_at"),
    _instant("ended_at"),
    UniqueConstraint("name"),
    CheckConstraint("state IN ('intended', 'submitted', 'running', 'ended')", name="state"),
)
Index("ix_engine_jobs_newest", engine_jobs.c.operation_id, engine_jobs.c.created_at.desc())
Index(
    "uq_engine_jobs_open",
    engine_jobs.c.operation_id,
    unique=True,
    postgresql_where=engine_jobs.c.state != text("'ended'"),
)

service = Table(
    "service",
    metadata,
    Column("id", Integer, primary_key=True),
    _instant("last_tick_at"),
    _instant("grace_until"),
    CheckConstraint("id = 1", name="one_row"),
)

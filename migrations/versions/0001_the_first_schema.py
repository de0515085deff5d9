"""the first schema"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "operations",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("workload", sa.Text(), nullable=False),
        sa.Column("job", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("labels", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("max_retries", sa.Integer(), nullable=False),
        sa.Column("submitted_by", sa.Text(), nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.Column("body_sha256", sa.Text(), nullable=True),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("event_seq", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("failures", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("lost_without_progress", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("not_before", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("resume_checkpoint_id", sa.Uuid(), nullable=True),
        sa.Column("resume_explicit", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("cancel_force", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("cancel_reason", sa.Text(), nullable=True),
        sa.Column("exit_unconfirmed", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("error", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("started_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("ended_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint("kind IN ('training')", name=op.f("ck_operations_kind")),
        sa.CheckConstraint(
            "status IN ('pending', 'running', 'waiting', 'cancelling', 'completed', 'failed', 'cancelled')",
            name=op.f("ck_operations_status"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_operations")),
        sa.UniqueConstraint("submitted_by", "idempotency_key", name=op.f("uq_operations_submitted_by_idempotency_key")),
    )
    op.create_index(
        "ix_operations_newest",
        "operations",
        [sa.literal_column("created_at DESC"), sa.literal_column("id DESC")],
        unique=False,
    )
    op.create_index(
        "ix_operations_queue",
        "operations",
        [sa.literal_column("priority DESC"), "created_at"],
        unique=False,
        postgresql_where=sa.text("status = 'pending'"),
    )
    op.create_table(
        "service",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("last_tick_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("grace_until", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint("id = 1", name=op.f("ck_service_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_service")),
    )
    op.create_table(
        "workers",
        sa.Column("incarnation", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.Column("workloads", sa.ARRAY(sa.Text()), nullable=False),
        sa.Column("versions", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("draining", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("registered_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("last_seen_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("incarnation", name=op.f("pk_workers")),
    )
    op.create_table(
        "workloads",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("config_schema", sa.JSON(), nullable=False),
        sa.Column("reports", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("updated_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_workloads")),
    )
    op.create_table(
        "attempts",
        sa.Column("operation_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("incarnation", sa.Uuid(), nullable=False),
        sa.Column("checkpoint_id", sa.Uuid(), nullable=True),
        sa.Column("start_step", sa.BigInteger(), nullable=False),
        sa.Column("claimed_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("started_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("ended_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.Column("error", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("trainer_pid", sa.Integer(), nullable=True),
        sa.Column("environment", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("exactness", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.CheckConstraint(
            "outcome IN ('completed', 'failed', 'preempted', 'cancelled', 'checkpoint_corrupt', 'refused', 'lost')",
            name=op.f("ck_attempts_outcome"),
        ),
        sa.ForeignKeyConstraint(["incarnation"], ["workers.incarnation"], name=op.f("fk_attempts_incarnation")),
        sa.ForeignKeyConstraint(["operation_id"], ["operations.id"], name=op.f("fk_attempts_operation_id")),
        sa.PrimaryKeyConstraint("operation_id", "number", name=op.f("pk_attempts")),
    )
    op.create_table(
        "events",
        sa.Column("operation_id", sa.Uuid(), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("from_status", sa.Text(), nullable=True),
        sa.Column("to_status", sa.Text(), nullable=False),
        sa.Column("detail", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.CheckConstraint(
            "from_status IN ('pending', 'running', 'waiting', 'cancelling', 'completed', 'failed', 'cancelled')",
            name=op.f("ck_events_from_status"),
        ),
        sa.CheckConstraint(
            "name IN ('submit', 'claim', 'refuse', 'checkpoint_corrupt', 'complete', 'fail', 'retry', 'preempt', 'stop', 'lost', 'plan', 'reduce', 'cancel', 'force', 'resume', 'note')",
            name=op.f("ck_events_name"),
        ),
        sa.CheckConstraint(
            "to_status IN ('pending', 'running', 'waiting', 'cancelling', 'completed', 'failed', 'cancelled')",
            name=op.f("ck_events_to_status"),
        ),
        sa.ForeignKeyConstraint(["operation_id"], ["operations.id"], name=op.f("fk_events_operation_id")),
        sa.PrimaryKeyConstraint("operation_id", "seq", name=op.f("pk_events")),
    )
    op.create_table(
        "slots",
        sa.Column("incarnation", sa.Uuid(), nullable=False),
        sa.Column("index", sa.Integer(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("device_uuid", sa.Text(), nullable=True),
        sa.Column("cores", sa.Integer(), nullable=False),
        sa.Column("operation_id", sa.Uuid(), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=True),
        sa.Column("rests_until", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint("device IN ('cpu', 'cuda')", name=op.f("ck_slots_device")),
        sa.ForeignKeyConstraint(["incarnation"], ["workers.incarnation"], name=op.f("fk_slots_incarnation")),
        sa.PrimaryKeyConstraint("incarnation", "index", name=op.f("pk_slots")),
    )
    op.create_table(
        "checkpoints",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("operation_id", sa.Uuid(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("checkpoint_type", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("phase", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("manifest_sha256", sa.Text(), nullable=False),
        sa.Column("pinned_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint(
            "checkpoint_type IN ('initial', 'periodic', 'cancel', 'preempt', 'final')",
            name=op.f("ck_checkpoints_checkpoint_type"),
        ),
        sa.CheckConstraint("phase IN ('update', 'evaluate')", name=op.f("ck_checkpoints_phase")),
        sa.CheckConstraint("status IN ('committed', 'corrupt', 'deleting')", name=op.f("ck_checkpoints_status")),
        sa.ForeignKeyConstraint(
            ["operation_id", "attempt"],
            ["attempts.operation_id", "attempts.number"],
            name=op.f("fk_checkpoints_operation_id_attempt"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_checkpoints")),
        sa.UniqueConstraint("path", name=op.f("uq_checkpoints_path")),
    )
    op.create_index(
        "ix_checkpoints_newest", "checkpoints", ["operation_id", sa.literal_column("step DESC")], unique=False
    )
    op.create_table(
        "holds",
        sa.Column("operation_id", sa.Uuid(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("incarnation", sa.Uuid(), nullable=False),
        sa.Column("lease_expires_at", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("last_seq", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("progress", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("first_step", sa.BigInteger(), nullable=True),
        sa.Column("last_step", sa.BigInteger(), nullable=True),
        sa.Column("checkpoint_step", sa.BigInteger(), nullable=True),
        sa.Column("ended_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["incarnation"], ["workers.incarnation"], name=op.f("fk_holds_incarnation")),
        sa.ForeignKeyConstraint(
            ["operation_id", "attempt"],
            ["attempts.operation_id", "attempts.number"],
            name=op.f("fk_holds_operation_id_attempt"),
        ),
        sa.PrimaryKeyConstraint("operation_id", "attempt", "incarnation", name=op.f("pk_holds")),
        postgresql_with={"fillfactor": "50"},
    )
    op.create_index(
        "ix_holds_live", "holds", ["operation_id"], unique=False, postgresql_where=sa.text("ended_at IS NULL")
    )
    op.create_table(
        "metrics",
        sa.Column("operation_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("first_step", sa.BigInteger(), nullable=False),
        sa.Column("steps", sa.ARRAY(sa.BigInteger()), nullable=False),
        sa.Column("values", sa.ARRAY(sa.Double()), nullable=False),
        sa.ForeignKeyConstraint(
            ["operation_id", "attempt"],
            ["attempts.operation_id", "attempts.number"],
            name=op.f("fk_metrics_operation_id_attempt"),
        ),
        sa.PrimaryKeyConstraint("operation_id", "name", "attempt", "first_step", name=op.f("pk_metrics")),
    )
    # Both tables are there now, so the references that go both ways can be made.
    op.create_foreign_key(
        "fk_operations_resume_checkpoint_id", "operations", "checkpoints", ["resume_checkpoint_id"], ["id"]
    )
    op.create_foreign_key("fk_attempts_checkpoint_id", "attempts", "checkpoints", ["checkpoint_id"], ["id"])

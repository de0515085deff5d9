"""studies"""

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

OUTCOMES = (
    "completed",
    "failed",
    "planned",
    "preempted",
    "cancelled",
    "checkpoint_corrupt",
    "refused",
    "lost",
)
EVENTS = (
    "submit",
    "claim",
    "refuse",
    "checkpoint_corrupt",
    "complete",
    "fail",
    "retry",
    "preempt",
    "stop",
    "lost",
    "plan",
    "reduce",
    "replan",
    "cancel",
    "resume",
    "force",
    "note",
    "replay_diverged",
)


def _one_of(table: str, column: str, words: tuple[str, ...]) -> None:
    op.drop_constraint(op.f(f"ck_{table}_{column}"), table, type_="check")
    op.create_check_constraint(op.f(f"ck_{table}_{column}"), table, f"{column} IN ({', '.join(map(repr, words))})")


def upgrade() -> None:
    _one_of("operations", "kind", ("training", "command", "study"))
    _one_of("attempts", "outcome", OUTCOMES)
    _one_of("events", "name", EVENTS)
    op.add_column("operations", sa.Column("phase", sa.Text(), nullable=True))
    op.create_check_constraint(op.f("ck_operations_phase"), "operations", "phase IN ('plan', 'reduce')")
    op.add_column("operations", sa.Column("parent_id", sa.Uuid(), nullable=True))
    op.add_column("operations", sa.Column("child_key", sa.Text(), nullable=True))
    op.add_column("operations", sa.Column("planned_attempt", sa.Integer(), nullable=True))
    op.create_foreign_key(op.f("fk_operations_parent_id"), "operations", "operations", ["parent_id"], ["id"])
    op.create_index(
        "ix_operations_children",
        "operations",
        ["parent_id", "child_key"],
        unique=True,
        postgresql_where=sa.text("parent_id IS NOT NULL"),
    )
    op.create_index(
        "ix_operations_live_children",
        "operations",
        ["parent_id"],
        postgresql_where=sa.text("parent_id IS NOT NULL AND status IN ('cancelling', 'pending', 'running', 'waiting')"),
    )
    op.create_index(
        "ix_operations_unended_studies",
        "operations",
        ["id"],
        postgresql_where=sa.text("kind = 'study' AND status IN ('waiting', 'cancelling')"),
    )
    op.create_table(
        "planned",
        sa.Column("parent_id", sa.Uuid(), nullable=False),
        sa.Column("child_key", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("about", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["parent_id"], ["operations.id"], name=op.f("fk_planned_parent_id")),
        sa.PrimaryKeyConstraint("parent_id", "child_key", name=op.f("pk_planned")),
    )
    op.create_table(
        "results",
        sa.Column("operation_id", sa.Uuid(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("content", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["operation_id"], ["operations.id"], name=op.f("fk_results_operation_id")),
        sa.PrimaryKeyConstraint("operation_id", name=op.f("pk_results")),
    )

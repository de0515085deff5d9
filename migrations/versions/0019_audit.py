"""the audit"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

ACTIONS = (
    "operation.submit",
    "operation.cancel",
    "operation.resume",
    "operation.fork",
    "operation.replay",
    "operation.delete",
    "operation.cleanup",
    "checkpoint.delete",
    "snapshot.upload",
    "worker.register",
    "worker.drain",
    "worker.undrain",
    "webhook.add",
    "webhook.remove",
    "webhook.test",
    "token.create",
    "token.revoke",
    "session.link",
    "session.log_in",
    "session.log_out",
    "access.refused",
    "access.forbidden",
)


def upgrade() -> None:
    op.create_table(
        "audit",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("who", sa.Text(), nullable=True),
        sa.Column("token_id", sa.Uuid(), nullable=True),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=True),
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("user_agent", sa.Text(), nullable=True),
        sa.Column("count", sa.Integer(), server_default=sa.text("1"), nullable=False),
        sa.Column("detail", postgresql.JSONB(), nullable=False),
        sa.CheckConstraint(f"action IN ({', '.join(map(repr, ACTIONS))})", name=op.f("ck_audit_action")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
    )
    op.create_index("ix_audit_newest", "audit", [sa.literal_column("at DESC"), sa.literal_column("id DESC")])

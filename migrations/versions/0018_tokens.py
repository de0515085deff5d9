"""tokens with scopes, and credentials of workers"""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "tokens",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("last_used_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint("scope IN ('read', 'operate', 'worker', 'admin')", name=op.f("ck_tokens_scope")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tokens")),
        sa.UniqueConstraint("digest", name=op.f("uq_tokens_digest")),
    )
    op.create_index("ix_tokens_name", "tokens", ["name"], unique=True, postgresql_where=sa.text("revoked_at IS NULL"))
    op.add_column("logins", sa.Column("token_id", sa.Uuid(), nullable=True))
    op.create_foreign_key(op.f("fk_logins_token_id"), "logins", "tokens", ["token_id"], ["id"])
    op.add_column("workers", sa.Column("credential", sa.LargeBinary(), nullable=True))
    op.add_column("workers", sa.Column("token_id", sa.Uuid(), nullable=True))
    op.create_foreign_key(op.f("fk_workers_token_id"), "workers", "tokens", ["token_id"], ["id"])
    op.create_index("ix_workers_credential", "workers", ["credential"], unique=True)

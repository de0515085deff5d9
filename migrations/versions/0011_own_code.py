"""commands, snapshots of the user's code, and who runs them"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_constraint(op.f("ck_operations_kind"), "operations", type_="check")
    op.create_check_constraint(op.f("ck_operations_kind"), "operations", "kind IN ('training', 'command')")
    op.create_table(
        "snapshots",
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("archive", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_snapshots")),
    )
    op.add_column("operations", sa.Column("code_sha256", sa.Text(), nullable=True))
    op.create_foreign_key(op.f("fk_operations_code_sha256"), "operations", "snapshots", ["code_sha256"], ["sha256"])
    op.create_index(
        "ix_operations_code",
        "operations",
        ["code_sha256"],
        unique=False,
        postgresql_where=sa.text("code_sha256 IS NOT NULL"),
    )
    op.add_column("workers", sa.Column("user_code", sa.Boolean(), server_default=sa.text("false"), nullable=False))

"""logs: which event the files of an operation are of; slots of mps"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("operations", sa.Column("logged_event_seq", sa.Integer(), nullable=True))
    op.create_index(
        "ix_operations_unlogged",
        "operations",
        ["id"],
        postgresql_where=sa.text(
            "status IN ('completed', 'failed', 'cancelled') AND logged_event_seq IS DISTINCT FROM event_seq"
        ),
    )
    op.drop_constraint(op.f("ck_slots_device"), "slots", type_="check")
    op.create_check_constraint(op.f("ck_slots_device"), "slots", "device IN ('cpu', 'cuda', 'mps')")

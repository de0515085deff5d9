"""replay"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("attempts", sa.Column("replay", JSONB(), nullable=True))
    op.add_column("operations", sa.Column("replay_of", sa.Uuid(), nullable=True))
    op.create_foreign_key("fk_operations_replay_of", "operations", "operations", ["replay_of"], ["id"])
    op.drop_constraint("ck_events_name", "events")
    op.create_check_constraint(
        "name",
        "events",
        "name IN ('submit', 'claim', 'refuse', 'checkpoint_corrupt', 'complete', 'fail', 'retry', 'preempt', 'stop', "
        "'lost', 'plan', 'reduce', 'cancel', 'resume', 'force', 'note', 'replay_diverged')",
    )

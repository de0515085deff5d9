"""accepted changes"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "operations", sa.Column("accept_changes", sa.Boolean(), server_default=sa.text("false"), nullable=False)
    )

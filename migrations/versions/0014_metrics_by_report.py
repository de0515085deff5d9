"""metrics know the report that brought them"""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("metrics", sa.Column("seq", sa.BigInteger(), nullable=True))
    # Before the first report that a hold can still send: numbers up to 0, in the order of their steps.
    op.execute("""
        UPDATE metrics m SET seq = numbered.seq
          FROM (SELECT operation_id, name, attempt, first_step,
                       row_number() OVER (PARTITION BY operation_id, attempt ORDER BY first_step, name)
                       - count(*) OVER (PARTITION BY operation_id, attempt) AS seq
                  FROM metrics) numbered
         WHERE (m.operation_id, m.name, m.attempt, m.first_step)
             = (numbered.operation_id, numbered.name, numbered.attempt, numbered.first_step)
    """)
    op.alter_column("metrics", "seq", nullable=False)
    op.drop_constraint("pk_metrics", "metrics")
    op.create_primary_key("pk_metrics", "metrics", ["operation_id", "attempt", "seq", "name"])
    op.create_index("ix_metrics_curve", "metrics", ["operation_id", "name", "attempt", "first_step"])

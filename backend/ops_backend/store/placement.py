"""What fits where: which free slots an operation gets, and whether the live workers could ever hold it."""

from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.sql import IS_LIVE, plain, statement
from ops_backend.tables import WISH
from ops_contract.jobs import Job


def runs(worker: str) -> str:
    """Whether it takes this operation `o`: see `runs_user_code`."""
    return f"""CASE WHEN o.workload = 'command' OR o.workload LIKE '%:%' THEN {worker}.user_code
                         ELSE o.workload = ANY ({worker}.workloads)
                              AND ({worker}.user_code OR coalesce(o.job->'env', '{{}}') = '{{}}') END"""


_DEVICES = "(o.job->'execution'->>'devices')::int"
_NODES = "(o.job->'resources'->>'nodes')::int"
IS_GANG = f"o.kind = 'training' AND {_DEVICES} > 1"


def suits(slot: str) -> str:
    """Whether a slot is what operation `o` asks for, alone; `offered` are all that there are.

    `auto` wants a GPU slot and takes a CPU slot only where no live worker offers this workload a GPU at all: a drained
    one still does. A study only plans and reduces, on any slot: what its job asks for its children need.
    """
    return f"""{runs(slot)}
               AND (o.kind = 'study' OR {slot}.cores >= coalesce((o.job->'resources'->>'cores')::int, 1))
               AND (o.kind = 'study' OR CASE o.job->'execution'->>'accelerator'
                     WHEN 'auto' THEN {slot}.device <> 'cpu' OR NOT EXISTS (
                          SELECT FROM offered g WHERE g.device <> 'cpu' AND {runs("g")})
                     ELSE {slot}.device = o.job->'execution'->>'accelerator' END)"""


def room(slots: str) -> str:
    """The slots that gang `o` could use among these, which are called `f`: all on one kind of device, never mps.

    With `share`, how many it takes of each node at least (of one, all), and `on_host`, how many that one has of them.
    A slot without a port is that of a worker which knows no gangs.
    """
    return f"""
                SELECT * FROM (
                    SELECT f.incarnation, f.index, f.host, f.cores, {_DEVICES} / coalesce({_NODES}, 1) AS share,
                           count(*) OVER (PARTITION BY f.host) AS on_host,
                           count(*) OVER (PARTITION BY f.incarnation) AS on_worker,
                           bool_or(f.is_local) OVER (PARTITION BY f.host) AS is_local
                      FROM {slots}
                       AND f.port IS NOT NULL AND {runs("f")}
                       AND f.cores >= coalesce((o.job->'resources'->>'cores')::int, 1)
                       AND f.device = CASE o.job->'execution'->>'accelerator' WHEN 'auto' THEN
                               CASE WHEN EXISTS (SELECT FROM offered g WHERE g.device = 'cuda' AND {runs("g")})
                                    THEN 'cuda' ELSE 'cpu' END
                               ELSE o.job->'execution'->>'accelerator' END) fitting
                 WHERE {_NODES} IS NULL OR on_host >= share"""


# What live workers offer; a lease counts as their sign of life. `is_local`: nobody else reaches that address.
OFFERED = f"""
        SELECT s.incarnation, s.index, s.device, s.cores, s.port, s.operation_id, s.attempt, s.rests_until,
               w.name, w.host, w.url, w.secret, w.workloads, w.user_code, w.drain IS NULL AS undrained,
               w.url ~ '^https?://(localhost|127[.]|\\[::1\\])' AS is_local
          FROM slots s JOIN workers w USING (incarnation)
         WHERE NOT w.draining AND {IS_LIVE}"""

# Of `room`: whether it is enough for gang `o`.
_IS_ENOUGH = f"""count(*) >= {_DEVICES} AND ({_NODES} IS NULL OR count(DISTINCT host) >= {_NODES})"""

# Which slots of its node a gang takes first, and the order of its ranks.
_FIRST = "cores = (o.job->'execution'->>'threads')::int DESC NULLS LAST, on_worker DESC, incarnation, index"
_RANKS = "is_local, node, incarnation, index"
QUEUE = "ORDER BY o.priority DESC, o.created_at, o.id"

# By scalars that are read once: null, and so false, where no gang reserves.
BEHIND = """coalesce((-o.priority, o.created_at, o.id) > ((SELECT -priority FROM head),
                               (SELECT created_at FROM head), (SELECT id FROM head)), false)"""

# A slot is free while the hold it was last given to is not alive. A frozen number of threads prefers a slot of that
# many cores.
# A gang takes its slots all or none. The first one of the queue that the live workers could hold reserves what it could
# use: whoever is behind it passes those over, else the small ones would always be there first. It takes the host that
# has the least room which is enough, else as few hosts as there can be. Ranks go by member, the members of a host side
# by side; an address that only its own host reaches cannot be rank 0's for others.
# Of those that wish for the same, only the first one due is looked at: where that does not fit, none behind it does. So
# a claim costs what there are of different wishes, not of operations that wait.
#
# Of it, after WITH RECURSIVE: the `first` of each wish, what is offered, and what a claim may give (`free`; what is
# `reserved` is not for who is behind the `head`).
SUPPLY = f"""offered AS MATERIALIZED ({OFFERED}
    ), vacant AS MATERIALIZED (
        SELECT f.* FROM offered f
         WHERE f.undrained AND coalesce(f.rests_until <= now(), true)
           AND NOT EXISTS (SELECT FROM holds h
                            WHERE h.operation_id = f.operation_id AND h.attempt = f.attempt
                              AND h.incarnation = f.incarnation AND h.ended_at IS NULL)
    ), wishes AS (
        (SELECT {WISH} AS wish FROM operations
          WHERE {WISH} IS NOT NULL AND EXISTS (SELECT FROM vacant) ORDER BY {WISH} LIMIT 1)
        UNION ALL
        SELECT (SELECT {WISH} FROM operations
                 WHERE {WISH} > wishes.wish ORDER BY {WISH} LIMIT 1)
          FROM wishes WHERE wishes.wish IS NOT NULL
    ), first AS MATERIALIZED (
        SELECT due.*
          FROM wishes
          CROSS JOIN LATERAL (
            SELECT o.id, o.priority, o.created_at, o.not_before, o.kind, o.workload, o.job
              FROM operations o
             WHERE {WISH} = wishes.wish AND coalesce(o.not_before <= now(), true)
             {QUEUE} LIMIT 1
          ) due
    ), head AS MATERIALIZED (
        SELECT o.id, o.priority, o.created_at, reserved.*
          FROM (SELECT * FROM first o WHERE {IS_GANG} {QUEUE} OFFSET 0) o
          CROSS JOIN LATERAL (
            SELECT array_agg(incarnation) AS incarnations, array_agg(index) AS indexes
              FROM ({room("offered f WHERE f.undrained")}) usable
            HAVING {_IS_ENOUGH}
          ) reserved
         {QUEUE} LIMIT 1
    ), free AS MATERIALIZED (
        SELECT f.*, (f.incarnation, f.index) IN (
                        SELECT r.incarnation, r.index FROM head, unnest(head.incarnations, head.indexes)
                                                                     AS r (incarnation, index)) AS reserved
          FROM vacant f"""

# The slots that operation `o` gets of `free` just now, the leader's first; null where it cannot be placed.
PLACED = f"""
            SELECT CASE WHEN {IS_GANG} THEN (
                SELECT jsonb_agg(jsonb_build_array(incarnation, index) ORDER BY {_RANKS})
                  FROM (
                    SELECT *, row_number() OVER (ORDER BY node, {_FIRST}) AS nth,
                           row_number() OVER (PARTITION BY node ORDER BY {_FIRST}) AS nth_of_node
                      FROM (
                        SELECT *, dense_rank() OVER (
                                      ORDER BY on_host >= share DESC,
                                               CASE WHEN on_host >= share THEN on_host ELSE -on_host END, host) AS node
                          FROM ({room(f"free f WHERE NOT (f.reserved AND {BEHIND})")}) usable
                      ) by_node
                  ) ordered
                 WHERE CASE WHEN {_NODES} IS NULL THEN nth <= {_DEVICES}
                            ELSE node <= {_NODES} AND nth_of_node <= share END
                HAVING count(*) = {_DEVICES}
            ) ELSE (
                SELECT jsonb_build_array(jsonb_build_array(f.incarnation, f.index))
                  FROM free f
                 WHERE NOT (f.reserved AND {BEHIND}) AND {suits("f")}
                 ORDER BY o.kind = 'study' AND f.device = 'cpu' DESC,
                          f.cores = (o.job->'execution'->>'threads')::int DESC NULLS LAST, f.incarnation, f.index
                 LIMIT 1
            ) END AS slots OFFSET 0"""

# Of the job of a gang: what live workers could give it, drained ones too, whoever has it now.
COULD_HOLD = statement(f"""
    WITH offered AS MATERIALIZED ({OFFERED}
    ), o AS (
        SELECT CAST(:workload AS text) AS workload, CAST(:job AS jsonb) AS job
    )
    SELECT found.*, EXISTS (SELECT FROM offered) AS anybody
      FROM o CROSS JOIN LATERAL (
        SELECT count(*) AS slots, count(DISTINCT host) AS nodes, {_IS_ENOUGH} AS enough
          FROM ({room("offered f WHERE true")}) usable
      ) found
""")


@dataclass(frozen=True)
class Capacity:
    """Of live workers, taken slots included: so many slots suit a gang, on so many nodes with enough of them each."""

    enough: bool
    slots: int
    nodes: int
    anybody: bool  # whether any worker is live at all


async def capacity(session: AsyncSession, job: Job, lease_s: float) -> Capacity:
    """For the gang of `job`."""
    values = {"workload": job.workload, "job": plain(job), "lease_s": lease_s}
    return Capacity(**(await session.execute(COULD_HOLD, values)).mappings().one())

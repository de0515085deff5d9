"""What `ops backup` and `ops restore` say when they are done."""

from datetime import datetime
from typing import Final

from ops_contract.wire import Wire

# In a storage root that a restore is filling: which backup it is. Nothing starts there.
RESTORING: Final = "restoring"


class Taken(Wire):
    """A backup that is whole. `missing`: named by rows, but not there. `changed`: written to while they were read."""

    path: str
    size_bytes: int
    operations: int
    missing: list[str]
    changed: list[str]


class Restored(Wire):
    """`set_aside`: where what was there before is now. `deliveries`: told to webhooks again, under the same ids."""

    taken_at: datetime
    relight: str
    operations: int
    deliveries: int
    set_aside: str | None = None

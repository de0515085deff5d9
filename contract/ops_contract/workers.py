"""What operations run on: workers with their slots, and the workloads that they offer."""

from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from pydantic import Field

from ops_contract.energy import DeviceNow
from ops_contract.lifecycle import Drain
from ops_contract.wire import Wire


class SlotView(Wire):
    index: int
    device: Literal["cpu", "cuda", "mps"]
    device_uuid: str | None
    cores: int
    operation_id: UUID | None
    attempt: int | None


class DrainRequest(Wire):
    """POST /workers/{id}/drain."""

    preempt: bool = Field(False, description="hand back what runs, from a checkpoint, instead of letting it finish")


class WorkerView(Wire):
    """`live` while its last heartbeat is younger than a lease; `draining` while no more work goes to it.

    `drain` is what an operator wishes; None while it drains by itself, because its process is ending.
    """

    id: UUID
    name: str
    host: str
    url: str
    live: bool
    draining: bool
    drain: Drain | None
    user_code: bool = Field(False, description="runs commands and workloads that its users bring")
    registered_at: datetime
    last_seen_at: datetime
    versions: dict[str, str]
    slots: list[SlotView]
    devices: list[DeviceNow] = Field([], description="its GPUs, as its last heartbeat told them")


class Workers(Wire):
    items: list[WorkerView]


class WorkloadView(Wire):
    name: str
    title: str
    config_schema: dict[str, Any]
    reports: dict[str, str]


class Workloads(Wire):
    items: list[WorkloadView]

"""Webhooks: who is told when operations end, and what they are sent."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal
from uuid import UUID

from pydantic import AfterValidator, Field, HttpUrl, StringConstraints

from ops_contract.lifecycle import Ended, Status
from ops_contract.operations import OperationSummary
from ops_contract.wire import Name, Wire

MAX_URL = 1000  # an index holds it


class WebhookFormat(StrEnum):
    """What the receiver reads."""

    JSON = "json"  # WebhookBody
    SLACK = "slack"  # {"text": …}: Slack, Mattermost, Rocket.Chat
    DISCORD = "discord"  # {"content": …}


class DeliveryState(StrEnum):
    """Where a delivery stands."""

    DUE = "due"  # to be sent at next_try_at
    DELIVERED = "delivered"  # answered with 2xx
    GIVEN_UP = "given_up"  # after the last retry, or because its webhook was stopped


def _plain(url: HttpUrl) -> HttpUrl:
    if url.username or url.password:
        raise ValueError("a user or password in it would be shown in every list: leave it out, requests are signed")
    if len(str(url)) > MAX_URL:
        raise ValueError(f"longer than {MAX_URL} characters")
    return url


class WebhookRequest(Wire):
    """POST /webhooks. `label` (`key` or `key=value`) narrows it to operations that have it."""

    url: Annotated[HttpUrl, AfterValidator(_plain)]
    format: WebhookFormat = WebhookFormat.JSON
    statuses: set[Ended] = Field({Status.COMPLETED, Status.FAILED, Status.CANCELLED}, min_length=1)
    label: Name | None = None
    description: Annotated[str, StringConstraints(max_length=500, pattern=r"^[^\x00-\x1f\x7f]*$")] = ""


class DeliveryView(Wire):
    """`id` is the `webhook-id` of every try. `answer` begins as what the receiver said, or says why nobody did."""

    id: UUID
    operation_id: UUID
    status: Status
    state: DeliveryState
    tries: int
    created_at: datetime
    last_try_at: datetime | None
    next_try_at: datetime | None
    http_status: int | None
    answer: str


class Deliveries(Wire):
    """Newest first."""

    items: list[DeliveryView]


class WebhookView(Wire):
    """`last` is the delivery tried last. `failures` of those kept were tried and have not arrived.

    `stopped_at`: since its receiver answered 410 nothing is sent any more.
    """

    id: UUID
    url: str
    format: WebhookFormat
    statuses: list[Ended]
    label: str | None
    description: str
    created_at: datetime
    stopped_at: datetime | None
    last: DeliveryView | None
    failures: int
    next_try_at: datetime | None


class Webhooks(Wire):
    items: list[WebhookView]


class WebhookCreated(Wire):
    """The only answer that has the secret."""

    id: UUID
    secret: str


class WebhookAnswer(Wire):
    """What the receiver said to one request; `http_status` null: none answered, and `answer` says why."""

    delivered: bool
    http_status: int | None
    answer: str


class WebhookBody(Wire):
    """What a receiver of JSON is sent: the operation as it was at that end. `webhook.test` has a made-up one."""

    type: Literal["operation.completed", "operation.failed", "operation.cancelled", "webhook.test"]
    timestamp: datetime
    data: OperationSummary

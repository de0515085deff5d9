"""What an agent of this state directory left that was killed: sent in its name by its successor."""

import logging
from collections.abc import Collection

from ops_worker.api_client import NobodyKnows, PredecessorsApi
from ops_worker.delivery import Delivery
from ops_worker.energy.booking import Readings, book_gaps
from ops_worker.energy.delivery import EnergyDelivery
from ops_worker.outbox import Outbox

log = logging.getLogger(__name__)


async def send(orphan: Outbox, readings: Readings, devices: Collection[str]) -> None:
    """And close it; raises nothing. `devices` are measured here."""
    sender = orphan.sender
    try:
        await book_gaps(orphan, readings, devices)
        async with PredecessorsApi(sender.api_url, sender.credential) as api:
            for ref in await orphan.holds():
                log.info("sending what worker %s left", sender.incarnation, extra=ref.model_dump())
                delivery = Delivery(api, orphan, sender.incarnation, ref)
                delivery.close()
                await delivery.run()
                await orphan.forget(ref)
            await EnergyDelivery(api, orphan, sender.incarnation).drain()
    except NobodyKnows as problem:
        stays = "what worker %s left stays for the next start: %s; delete its outbox when nobody misses it"
        log.error(stays, sender.incarnation, problem)
    except Exception:
        log.exception("the outbox of worker %s stays for the next start", sender.incarnation)
    finally:
        await orphan.aclose()

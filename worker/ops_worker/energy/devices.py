"""The GPUs and meters of a worker: what its slots are, what each of them sees, and what measures it."""

import asyncio
import functools
import logging
import os
import platform
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ops_contract.agents import CheckpointRef, SlotOffer
from ops_contract.energy import Quality
from ops_contract.errors import ErrorCode, OpsError
from ops_worker.energy.meters import Estimate, Meter, SlotMeter
from ops_worker.energy.nvml import Driver, Gpu, nvml_meter
from ops_worker.energy.preflight import Preflight, preflight
from ops_worker.energy.rapl import POWERCAP, rapl_meters
from ops_worker.energy.sampler import Sampler
from ops_worker.settings import Settings, SettingsError
from ops_worker.waiting import in_daemon
from relight.interpreter import versions_of

log = logging.getLogger(__name__)

# Well within the time that the backend waits for the answer to a start.
PREFLIGHT_S = 3.0
# Without persistence mode a driver is loaded when it is asked: seconds for each GPU.
DRIVER_S = 60.0


class Devices:
    """What `open_devices` found. Slots are numbered: first one for each GPU, then the CPU's.

    `hides_gpus`: the GPUs of this host are slots, of this worker or another, and nothing else may use them.
    """

    def __init__(
        self,
        settings: Settings,
        driver: Driver | None = None,
        gpus: Sequence[Gpu] = (),
        hides_gpus: bool = False,
        powercap: Path = POWERCAP,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._driver = driver
        self._gpus = gpus
        self._hides_gpus = hides_gpus
        self._looking: dict[str, asyncio.Future[Preflight]] = {}
        self._settings = settings
        self._cores = settings.cores_per_slot(len(gpus))
        wholes = list({gpu.whole.uuid: gpu.whole for gpu in gpus}.values())
        self._gpu_meters = {gpu.uuid: meter for gpu in wholes if (meter := nvml_meter(gpu, _quality(gpu, gpus), clock))}
        self._cpu_meters = self._of_the_cpu(powercap, clock)
        meters = [*self._gpu_meters.values(), *self._cpu_meters]
        self.sampler = Sampler(meters, wholes, settings.energy_interval_s, clock)

    def offers(self) -> list[SlotOffer]:
        gpus = [
            SlotOffer(index=index, device="cuda", device_uuid=gpu.uuid, cores=self._cores)
            for index, gpu in enumerate(self._gpus)
        ]
        cpus = range(len(gpus), len(gpus) + self._settings.cpu_slots)
        return gpus + [SlotOffer(index=index, device="cpu", cores=self._cores) for index in cpus]

    def gpu(self, slot: int) -> Gpu | None:
        return self._gpus[slot] if slot < len(self._gpus) else None

    def environ(self, slot: int) -> dict[str, str]:
        """What makes a trainer see its own GPU alone, and one of a CPU slot none."""
        gpu = self.gpu(slot)
        if gpu is None:
            return {"CUDA_VISIBLE_DEVICES": ""} if self._hides_gpus else {}
        return {"CUDA_VISIBLE_DEVICES": gpu.uuid}

    def meters(self, *slots: int) -> tuple[SlotMeter, ...]:
        """What a hold on them is booked on, each device once; none: nothing here can be measured."""
        meters = [meter for slot in slots for meter in self._meters_of(slot)]
        times = Counter(meter.device for meter in meters if meter.quality is Quality.ESTIMATED)
        return tuple(
            SlotMeter(meter.device, meter.source, meter.quality, times.get(meter.device, 1))
            for meter in {meter.device: meter for meter in meters}.values()
        )

    def environment(self, first_slot: int, *others: int) -> dict[str, Any]:
        """For people: what an attempt ran on, as far as the agent knows it. The GPU is that of its first slot."""
        meters = [f"{meter.device}: {meter.source}, {meter.quality}" for meter in self.meters(first_slot, *others)]
        about: dict[str, Any] = {"host": socket.gethostname(), "kernel": platform.release(), "energy_meters": meters}
        gpu = self.gpu(first_slot)
        if gpu is not None and self._driver is not None:
            about |= {
                "gpu": gpu.name,
                "gpu_uuid": gpu.uuid,
                "gpu_memory_bytes": gpu.memory_total_bytes,
                "gpu_power_limit_w": gpu.whole.power_limit_w,
                "driver": self._driver.version,
                "driver_cuda": self._driver.cuda_version,
            }
        return about

    async def check(self, slots: Sequence[int], checkpoint: CheckpointRef | None) -> list[str]:
        """Before a start; the warnings. Raises 409 `device_not_ready` with all that is wrong."""
        gpus = [gpu for slot in slots if (gpu := self.gpu(slot)) is not None]
        found = await asyncio.gather(*(self._look(gpu, checkpoint) for gpu in gpus))
        # The same of all of them, as that the disk is full, is said once.
        failures = list(dict.fromkeys(failure for each in found for failure in each.failures))
        warnings = list(dict.fromkeys(warning for each in found for warning in each.warnings))
        if failures:
            message = "; ".join(failures + warnings)
            raise OpsError(ErrorCode.DEVICE_NOT_READY, message, failures=failures, warnings=warnings)
        return warnings

    def close(self) -> None:
        # While a call of it hangs, NVML cannot be closed.
        if self.sampler.stop() and self._driver is not None:
            self._driver.close()

    async def _look(self, gpu: Gpu, checkpoint: CheckpointRef | None) -> Preflight:
        if self._driver is None:
            return Preflight()
        root, torch = self._settings.storage_root, _torch(self._settings)
        look = functools.partial(preflight, gpu, self._driver.cuda_version, torch, checkpoint, root)
        # One that hangs is not asked once more for every start.
        looking = self._looking.get(gpu.uuid) or self._looking.setdefault(gpu.uuid, in_daemon(look))
        try:
            return await asyncio.wait_for(asyncio.shield(looking), PREFLIGHT_S)
        except TimeoutError:
            problem = f"the driver does not answer about {gpu.uuid} within {PREFLIGHT_S:g} s"
            return Preflight(failures=[f"{problem}; `nvidia-smi`, and dmesg, say more"])
        finally:
            if looking.done():
                self._looking.pop(gpu.uuid, None)

    def _meters_of(self, slot: int) -> list[Meter]:
        gpu = self.gpu(slot)
        meters: list[Meter] = list(self._cpu_meters)
        if gpu is not None:
            # An estimate of a CPU beside the GPU's measured joules would only spoil the sum.
            meters = [meter for meter in meters if meter.quality is not Quality.ESTIMATED]
            if own := self._gpu_meters.get(gpu.whole.uuid):
                meters.insert(0, own)
        return meters

    def _of_the_cpu(self, powercap: Path, clock: Callable[[], float]) -> Sequence[Meter]:
        settings = self._settings
        # Only who has the whole host to himself used what its packages used.
        alone = settings.cpu_slots == 1 and not self._gpus and self._cores >= (os.cpu_count() or 1)
        packages = rapl_meters(Quality.MEASURED if alone else Quality.UPPER_BOUND, powercap, clock)
        if packages or settings.cpu_power_w is None:
            return packages
        return [Estimate(settings.cpu_power_w, self._cores, clock)]


@contextmanager
def open_devices(settings: Settings, environ: Mapping[str, str], powercap: Path = POWERCAP) -> Iterator[Devices]:
    """What this worker may use, measured from here on. Raises SettingsError for a GPU that is not there."""
    devices = None
    if settings.gpus != "none":
        devices = _in_time(lambda: _found(settings, environ, powercap))
        if devices is None:
            log.error("no GPU is used: the driver does not answer within %g s; see `nvidia-smi`, and dmesg", DRIVER_S)
    devices = devices or Devices(settings, powercap=powercap)
    devices.sampler.start()
    try:
        yield devices
    finally:
        devices.close()


def _found(settings: Settings, environ: Mapping[str, str], powercap: Path) -> Devices:
    driver = Driver.open()
    chosen = _chosen(driver.gpus(), settings, environ) if driver else []
    share, of = settings.gpu_share_of
    return Devices(settings, driver, chosen[share - 1 :: of], bool(chosen), powercap)


def _in_time(find: Callable[[], Devices]) -> Devices | None:
    """None when the driver hangs: a worker without GPUs is better than none."""
    finding = Future[Devices]()

    def run() -> None:
        try:
            finding.set_result(find())
        except Exception as error:
            finding.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return finding.result(DRIVER_S)
    except TimeoutError:
        return None


def _quality(whole: Gpu, offered: Sequence[Gpu]) -> Quality:
    """An instance has no counter: what the whole GPU takes is the most that it can have taken."""
    instances = any(gpu.parent is whole for gpu in offered)
    return Quality.UPPER_BOUND if instances else Quality.MEASURED


def _chosen(gpus: Sequence[Gpu], settings: Settings, environ: Mapping[str, str]) -> list[Gpu]:
    gpus = _with_instances(gpus)
    # As CUDA reads it: what comes after something that is not there does not count.
    if (visible := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        gpus, _ = _named(gpus, visible)
    if settings.gpus not in (None, "all"):
        chosen, missing = _named(gpus, str(settings.gpus))
        if missing is not None:
            there = ", ".join(f"{index}: {gpu.uuid}" for index, gpu in enumerate(gpus)) or "none"
            raise SettingsError(f"OPS_GPUS: there is no GPU {missing!r} here; there are {there}")
        gpus = chosen
    if settings.gpus is None and gpus and (torch := _torch(settings)) and torch.endswith("+cpu"):
        log.warning("torch %s has no CUDA: no GPU is offered. Install one that has, or set OPS_GPUS=all", torch)
        return []
    return gpus


def _with_instances(gpus: Sequence[Gpu]) -> list[Gpu]:
    """A GPU in MIG mode runs nothing but its instances."""
    found: list[Gpu] = []
    for gpu in gpus:
        if not gpu.in_mig_mode:
            found.append(gpu)
        elif instances := gpu.instances():
            log.info("%s is divided into %d MIG instances, each is a slot", gpu.uuid, len(instances))
            found += instances
        else:
            log.warning("%s is in MIG mode without an instance and is left out: `nvidia-smi mig -cgi`", gpu.uuid)
    return found


def _named(gpus: Sequence[Gpu], names: str) -> tuple[list[Gpu], str | None]:
    """In the order of the names, up to the first that is not there; that name."""
    found: list[Gpu] = []
    for name in filter(None, map(str.strip, names.split(","))):
        gpu = _find(gpus, name)
        if gpu is None:
            return found, name
        found.append(gpu)
    return found, None


def _find(gpus: Sequence[Gpu], name: str) -> Gpu | None:
    """By number, or by the beginning of its uuid, if that is one's alone."""
    if name.isdecimal():
        return gpus[int(name)] if int(name) < len(gpus) else None
    found = [gpu for gpu in gpus if gpu.uuid.startswith(name)]
    return found[0] if len(found) == 1 else None


def _torch(settings: Settings) -> str | None:
    """The version of the trainers' torch, where it is this interpreter's."""
    return None if settings.worker_python is not None else versions_of("torch").get("torch")

"""What this host sees of the storage root, for `ops doctor`: it reads what another published there, and publishes."""

import errno
import os
import shutil
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from secrets import token_bytes

from ops_contract.agents import PROBE_FILE, PROBE_PREFIX, ProbeStorage, StorageProbed
from relight.publish import published_directory, write_file

STALE_S = 600.0
_LOOK_EVERY_S = 0.005
_FILE_BYTES_MAX = 4096


def probe(root: Path, wish: ProbeStorage) -> StorageProbed:
    """Never raises OSError for what is asked about: it is in the answer. Blocks, as long as the storage does."""
    directory = f"{PROBE_PREFIX}{wish.probe.hex}"
    seen = _find(root / directory / wish.look_for / PROBE_FILE, wish.wait_s)
    if wish.absent:
        os.path.exists(root / directory / wish.absent)
    published: dict[str, str | None] = {}
    if wish.publish:
        published = _publish(root, directory, str(wish.incarnation))
    else:
        _take_back(root, directory, str(wish.incarnation))
    return StorageProbed.model_validate(
        {"root": str(root), "filesystem": _filesystem(root), "uid": os.geteuid(), "free_bytes": _free_bytes(root)}
        | seen
        | published
    )


def _find(path: Path, wait_s: float) -> dict[str, object]:
    began_s = time.monotonic()
    while True:
        try:
            with path.open("rb") as file:
                digest = sha256(file.read(_FILE_BYTES_MAX)).hexdigest()
            return {"found_sha256": digest, "found_after_ms": (time.monotonic() - began_s) * 1e3}
        except OSError as error:
            if time.monotonic() - began_s >= wait_s:
                return {"find_errno": _name(error)}
        time.sleep(_LOOK_EVERY_S)


def _publish(root: Path, directory: str, name: str) -> dict[str, str | None]:
    """As a checkpoint."""
    content = token_bytes(64)
    try:
        with published_directory(root, directory, name) as scratch:
            write_file(scratch, PROBE_FILE, [memoryview(content)])
    except OSError as error:
        return {"publish_errno": _name(error)}
    _remove_stale(root, directory)
    return {"published_sha256": sha256(content).hexdigest()}


def _take_back(root: Path, directory: str, name: str) -> None:
    shutil.rmtree(root / directory / name, ignore_errors=True)
    with suppress(OSError):
        (root / directory).rmdir()  # where another root has nothing but ours in it


def _remove_stale(root: Path, directory: str) -> None:
    """What a doctor left that was killed. By the storage's own clock."""
    with suppress(OSError):
        now_s = (root / directory).stat().st_mtime
        for path in root.glob(f"{PROBE_PREFIX}*"):
            with suppress(OSError):
                if now_s - path.lstat().st_mtime > STALE_S:
                    shutil.rmtree(path)


def _free_bytes(root: Path) -> int:
    with suppress(OSError):
        return shutil.disk_usage(root).free
    return 0


def _filesystem(root: Path) -> str:
    """Its type and source, such as `nfs4 of server:/export`; empty where the system does not tell."""
    place, best = f"{os.path.realpath(root)}/", ("", "")
    with suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            source, point, kind = line.split(" ")[:3]
            if place.startswith(f"{point.rstrip('/')}/") and len(point) >= len(best[0]):
                best = point, f"{kind} of {source}"
    return best[1]


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error.errno))

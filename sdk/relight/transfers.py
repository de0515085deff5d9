"""Files that go to a server and come from it: snapshots of code, artifacts, exports."""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import sha256 as sha256_of
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from uuid import UUID

import httpx

from ops_contract.history import Artifacts, ArtifactView
from ops_contract.jobs import Code
from ops_contract.operations import Operation
from ops_contract.wire import API_PREFIX
from relight import download
from relight.download import Part, Progress
from relight.transport import BACKOFF_S, TRIES, Transport, Unreachable, retries

if TYPE_CHECKING:
    from relight.packing import Packed

ExportFormat = Literal["csv", "tensorboard"]

EXPORT_TIMEOUT_S = 600.0


class Transfers(Transport):
    """`relight.Client` has these calls."""

    def upload(self, packed: "Packed") -> Code:
        """For a job's `code`; see `relight.packing.pack`. What the server has already is not sent again.

        It stays while an operation refers to it, and for a day before the first one does.
        """
        path = f"/snapshots/{packed.sha256}"
        # A refusal of this one has no body that could say why: the next one's has.
        if not self._call("HEAD", path, repeatable=True, checked=False).is_success:
            headers = {"Content-Type": "application/octet-stream"}
            self._call("PUT", path, content=packed.archive, headers=headers, repeatable=True)
        return packed.code

    def snapshot(self, sha256: str) -> bytes:
        """The archive of a snapshot, whole; `relight.archive` reads and unpacks it."""
        archive = self._call("GET", f"/snapshots/{sha256}", repeatable=True).content
        if sha256_of(archive).hexdigest() != sha256:
            raise Unreachable(f"the snapshot {sha256} was changed on its way here; try again")
        return archive

    def artifacts(self, operation_id: UUID | str) -> Sequence[ArtifactView]:
        """The files it left: the final model of a completed one, and `files/…` of every attempt."""
        return self._get(f"/operations/{operation_id}/artifacts", Artifacts).items

    def download(
        self,
        operation_id: UUID | str,
        to: Path | str,
        names: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Sequence[Path]:
        """Put its files, or those named, below `to`; `files/out/a.pt` becomes `out/a.pt` there.

        Each appears whole, after its SHA-256 was compared. One that was interrupted goes on where it was, and one that
        is there already is not sent again. Raises DownloadFailed, OSError for what the disk refuses.
        """
        path = f"{API_PREFIX}/operations/{operation_id}/artifacts"
        return [
            download.fetch(each, Path(to), partial(self._fill, f"{path}/{each.id}", each, progress))
            for each in download.newest(self.artifacts(operation_id), names)
        ]

    def export(self, operation_id: UUID | str, format: ExportFormat = "csv", to: Path | str = ".") -> Path:
        """Put every metric into a file, along the lineage and every bit kept; of a running operation so far.

        `to`: a directory, where it is `<name>-<id>.csv`, or below `<name>-<id>/` for `tensorboard --logdir TO`; or the
        file itself, when that ends in .csv. It appears whole, in the place of what was there. Raises OSError for what
        the disk refuses.
        """
        fill = partial(self._fill_export, operation_id, format)
        if format == "csv" and Path(to).suffix == ".csv":
            return download.replace(Path(to), fill)
        operation = self._get(f"/operations/{operation_id}", Operation)
        run = Path(to) / run_name(operation)
        if format == "csv":
            return download.replace(run.with_name(f"{run.name}.csv"), fill)
        began_at = operation.started_at or operation.created_at  # as the server names it in logs/
        return download.replace(run / f"events.out.tfevents.{int(began_at.timestamp())}.relight", fill)

    def export_pieces(self, operation_id: UUID | str, format: ExportFormat = "csv") -> Iterator[bytes]:
        """The bytes of such a file. What it raises may come after some."""
        url, wanted = f"{API_PREFIX}/operations/{operation_id}/export", {"format": format}
        try:
            # It is made whole before the first byte comes.
            with self._http.stream("GET", url, params=wanted, timeout=EXPORT_TIMEOUT_S) as response:
                if not response.is_success:
                    response.read()
                    self._checked(response)
                yield from response.iter_bytes()
        except httpx.TransportError as error:
            raise self._unreachable(error, True) from error

    def _fill(self, url: str, artifact: ArtifactView, progress: Progress | None, part: Part) -> None:
        """Tries again from where it is, a few times since it last got on."""
        tries = TRIES
        while True:
            had_bytes = part.size_bytes
            try:
                return self._go_on(url, artifact, progress, part)
            except Unreachable:
                tries = TRIES if part.size_bytes > had_bytes else tries - 1
                if not tries:
                    raise
            self._sleep(BACKOFF_S * 2 ** (TRIES - tries))

    def _go_on(self, url: str, artifact: ArtifactView, progress: Progress | None, part: Part) -> None:
        headers = {"Accept-Encoding": "identity"}
        if 0 < part.size_bytes < artifact.size_bytes:
            headers |= {"Range": f"bytes={part.size_bytes}-", "If-Range": f'"{artifact.sha256}"'}
        try:
            with self._http.stream("GET", url, headers=headers) as response:
                if not response.is_success:
                    response.read()
                    self._checked(response)
                if response.status_code != 206:
                    part.restart()
                for chunk in response.iter_bytes():
                    part.write(chunk)
                    if progress is not None:
                        progress(artifact, part.size_bytes)
        except httpx.TransportError as error:
            raise self._unreachable(error, True) from error

    def _fill_export(self, operation_id: UUID | str, format: ExportFormat, part: Part) -> None:
        for retry_in_s in retries():
            part.restart()
            try:
                for piece in self.export_pieces(operation_id, format):
                    part.write(piece)
                return
            except Unreachable:
                if retry_in_s is None:
                    raise
                self._sleep(retry_in_s)


def run_name(operation: Operation) -> str:
    """For a file or directory; the beginning of the id, which a name of ours ends in, tells those of one name apart."""
    short = str(operation.id)[:8]
    name = re.sub(r"[^0-9A-Za-z_.-]+", "-", operation.name.removesuffix(f"-{short}"))
    return f"{name[:80].lstrip('.-')}-{short}".lstrip("-")

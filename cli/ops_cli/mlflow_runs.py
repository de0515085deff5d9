"""An operation as a run of MLflow, by MLflow's own client. Importing this needs the extra `mlflow`."""

import csv
import os
import posixpath
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from datetime import UTC, datetime
from hashlib import sha256
from io import TextIOWrapper
from itertools import chain, islice
from pathlib import Path
from typing import Any
from uuid import UUID

import yaml

# MLflow reads these at every request. Its own minutes of retries would look like a hang.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

from mlflow import MlflowClient  # after its environment
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from requests.exceptions import RequestException

from ops_cli.jobs import leaves
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.lifecycle import Status
from ops_contract.operations import Operation
from ops_contract.wire import API_PREFIX
from relight.client import Client
from relight.transport import Unreachable

Points = Iterator[tuple[str, int, float]]

OPERATION_TAG = "relight.operation_id"
# What an MLflow server takes.
PARAMS_A_BATCH, METRICS_A_BATCH = 100, 1000
PARAM_CHARS, TAG_CHARS, KEY_CHARS = 6000, 5000, 250

_STATUS = {
    Status.PENDING: "SCHEDULED",
    Status.COMPLETED: "FINISHED",
    Status.FAILED: "FAILED",
    Status.CANCELLED: "KILLED",
}


class Tracking:
    """An experiment, made where it is not there. Every method raises Unreachable, or OpsError for MLflow's refusals."""

    def __init__(self, to: str | None, experiment: str) -> None:
        """`to`: a tracking URI, or a directory that gets a database; None is what MLflow's environment says."""
        self._artifacts = None
        if to is not None and not re.match(r"[a-z][a-z0-9+.-]*:", to):
            directory = Path(to).resolve()
            directory.mkdir(parents=True, exist_ok=True)
            to, self._artifacts = f"sqlite:///{directory / 'mlflow.db'}", (directory / "artifacts").as_uri()
        self._mlflow, self._experiment_id = _spoken(lambda: self._opened(to, experiment))

    def replace(self, client: Client, operation_id: UUID, with_files: bool) -> tuple[str, str | None]:
        """The id and URL of a new run, in place of those there were of this operation: these go when it is whole."""
        operation = client.get(operation_id)
        with tempfile.TemporaryFile() as table, tempfile.TemporaryDirectory() as files:
            for piece in client.export_pieces(operation_id):
                table.write(piece)
            table.seek(0)
            points = _points(TextIOWrapper(table, "utf-8", newline=""))
            if with_files:
                client.download(operation_id, files)
            points = chain(points, _joules(operation))
            tags = _tags(client, operation)
            run_id: str = _spoken(lambda: self._write(operation, tags, points, Path(files)))
        return run_id, self._url(run_id)

    def _opened(self, uri: str | None, experiment: str) -> tuple[Any, str]:
        mlflow = MlflowClient(tracking_uri=uri)
        found = mlflow.get_experiment_by_name(experiment)
        if found is None:
            try:
                return mlflow, mlflow.create_experiment(experiment, artifact_location=self._artifacts)
            except MlflowException:
                found = mlflow.get_experiment_by_name(experiment)  # made by another export at the same time
                if found is None:
                    raise
        return mlflow, found.experiment_id

    def _write(self, operation: Operation, tags: dict[str, str], points: Points, files: Path) -> str:
        began_ms = _ms(operation.started_at or operation.created_at)
        old = self._mlflow.search_runs([self._experiment_id], f"tags.`{OPERATION_TAG}` = '{operation.id}'")
        run = self._mlflow.create_run(self._experiment_id, began_ms, tags, operation.name)
        run_id: str = run.info.run_id
        params = (Param(key, value) for key, value in params_of(operation.job.model_dump(mode="json")).items())
        while batch := list(islice(params, PARAMS_A_BATCH)):
            self._mlflow.log_batch(run_id, params=batch)
        metrics = (Metric(key_of(name), value, began_ms, step) for name, step, value in points)
        while batch := list(islice(metrics, METRICS_A_BATCH)):
            self._mlflow.log_batch(run_id, metrics=batch)
        hparams = yaml.safe_dump(operation.job.model_dump(mode="json"), sort_keys=False)
        self._mlflow.log_text(run_id, hparams, "hparams.yaml")
        if any(files.iterdir()):
            self._mlflow.log_artifacts(run_id, str(files))
        self._end(run_id, operation)
        for each in old:
            self._mlflow.delete_run(each.info.run_id)
        return run_id

    def _end(self, run_id: str, operation: Operation) -> None:
        """A run without the tag `relight.exported_at` is one whose export was killed; the next one deletes it."""
        status = _STATUS.get(operation.status, "RUNNING")
        if operation.ended_at is not None:
            self._mlflow.set_terminated(run_id, status, _ms(operation.ended_at))
        else:
            self._mlflow.update_run(run_id, status)
        self._mlflow.set_tag(run_id, "relight.exported_at", datetime.now(UTC).isoformat(timespec="seconds"))

    def _url(self, run_id: str) -> str | None:
        uri = str(self._mlflow.tracking_uri).rstrip("/")
        return f"{uri}/#/experiments/{self._experiment_id}/runs/{run_id}" if uri.startswith("http") else None


def _spoken(call: Callable[[], Any]) -> Any:
    """Its result; what MLflow prints goes to stderr."""
    try:
        with redirect_stdout(sys.stderr):
            return call()
    except (MlflowException, RequestException) as error:
        if _is_away(error):
            raise Unreachable(f"MLflow does not answer: {error}; look at --to, or try again") from error
        raise OpsError(ErrorCode.INTERNAL, f"MLflow refuses: {error}") from error


def _is_away(error: BaseException | None) -> bool:
    """requests' errors are OSErrors; MLflow's own name no cause."""
    return error is not None and (isinstance(error, OSError) or _is_away(error.__cause__ or error.__context__))


def _points(table: TextIOWrapper) -> Points:
    """Name, step and value of every cell of a metrics.csv."""
    rows = csv.reader(table)
    names = next(rows)
    at = names.index("step")
    for row in rows:
        for column, (name, cell) in enumerate(zip(names, row, strict=True)):
            if cell and column != at:
                yield name, int(row[at]), float(cell)


def _joules(operation: Operation) -> Points:
    """What is known of them; MLflow has no null."""
    energy = operation.energy
    known = {"energy_j": energy.total_j, "useful_j": energy.useful_j, "lost_j": energy.lost_j}
    step = (operation.progress.step if operation.progress else None) or 0
    for name, value in (known | {"overhead_j": energy.overhead_j}).items():
        if value is not None:
            yield f"relight.{name}", step, value


def params_of(job: Mapping[str, Any]) -> dict[str, str]:
    """The leaves of the job."""
    return {key_of(path): _cut(value, PARAM_CHARS) for path, value in leaves(job)}


def key_of(name: str) -> str:
    """As MLflow takes it. A name that has to be changed for that ends in a hash, so that no two become one."""
    plain = re.sub(r"[^\w.\- :/]", "_", name)
    if posixpath.normpath(plain) != plain or plain.startswith(("/", "..")):
        plain = plain.replace("/", "_").strip(".") or "_"
    if plain == name and len(name) <= KEY_CHARS:
        return name
    return f"{plain[: KEY_CHARS - 9]}-{sha256(name.encode()).hexdigest()[:8]}"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 40]}… ({len(text)} characters)"


def _tags(client: Client, operation: Operation) -> dict[str, str]:
    tags = {
        OPERATION_TAG: str(operation.id),
        "relight.attempt": str(operation.attempt),
        "relight.url": f"{client.server.url}{API_PREFIX}/operations/{operation.id}",
        "relight.status": operation.status,
    }
    if operation.exactness is not None:
        tags["relight.exactness"] = operation.exactness.promise
    labels = {key_of(f"relight.label.{key}"): _cut(value, TAG_CHARS) for key, value in operation.labels.items()}
    return tags | labels


def _ms(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)

"""`relight.measure`: what a model takes and gives on the service's hardware, in one call."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ops_contract.jobs import JobSpec
from ops_contract.lifecycle import Status
from ops_contract.measurements import MEASUREMENT, MeasurementConfig, MeasurementResult, RandomModel, Task
from ops_contract.operations import Operation
from ops_contract.problems import unknown_field
from ops_contract.study_results import GridGroup, GridResult, GridRow, Statistic
from ops_studies import comparison, pareto

if TYPE_CHECKING:
    from relight.client import Client, Results

Model = str | RandomModel | Mapping[str, Any]


def measure(
    model: Model | Sequence[Model],
    *,
    client: "Client | None" = None,
    cycles: int = 1,
    order: str | None = None,
    stop_after_failures: int | None = None,
    vary: Mapping[str, Sequence[Any]] | None = None,
    timeout_s: float | None = None,
    name: str | None = None,
    labels: Mapping[str, str] | None = None,
    progress: bool = False,
    **fields: Any,
) -> "MeasurementStudy":
    """Measures tokens per second and joules per token, and waits for it.

    `model`: a directory on the worker, a name on Hugging Face, or `{"model_type": "gpt2", "config": {…}}` with random
    weights. `fields` are those of a measurement's config and of its task: `batch_size=8, n_prompts=64`. A list makes an
    axis: `batch_size=[1, 8], precision=["float32", "bfloat16"]` are four points, each measured `cycles` times in the
    `order` of a grid. `vary` has axes by their paths: `{"config.warmup.batches": [1, 5]}`. Each run that takes longer
    than `timeout_s` is killed.

    Interrupted it leaves the operation alone. Raises TypeError for a field that there is not, ValidationError and
    OpsError as `Client.submit`, RuntimeError where not one run completed.
    """
    config, axes = _split({"model": model, **fields})
    axes |= {path: list(values) for path, values in (vary or {}).items()}
    asked = _given(name=name, labels=labels and dict(labels), execution=_given(timeout_s=timeout_s) or None)
    study = study_of(axes, cycles, order, stop_after_failures)
    job = JobSpec.model_validate({"workload": MEASUREMENT, "config": config} | asked | study)
    if client is not None:
        return _measured(client, job, progress)
    from relight.client import Client

    with Client() as own:
        return _measured(own, job, progress)


class MeasurementStudy:
    """What came of it. `print` shows the table; `result` has all of it as plain data.

    `measurement` has every figure with its uncertainty and source, where one thing was measured once; of a study
    `Client.results` has it for the `operation_id` of each row.
    """

    def __init__(self, operation: Operation, result: GridResult, measurement: MeasurementResult | None = None) -> None:
        self.operation = operation
        self.result = result
        self.measurement = measurement

    @property
    def rows(self) -> list[GridRow]:
        """A run each, failed ones too: `final` has its figures by name."""
        return self.result.rows

    @property
    def groups(self) -> list[GridGroup]:
        """A point each: `metrics` has mean and 95 % interval of every figure over its cycles."""
        return self.result.groups

    @property
    def warnings(self) -> list[str]:
        return self.result.warnings

    def pareto(self) -> list[GridGroup]:
        """The points that no other betters in both tokens per second and joules per token."""
        return [group for group, on_it in zip(self.groups, pareto.of_groups(self.groups), strict=True) if on_it]

    def table(self) -> str:
        """In Markdown: a row for each point, with 95 % intervals, a star on the Pareto front."""
        return comparison.markdown(self.result)

    def __str__(self) -> str:
        unknown = {} if self.measurement is None else self.measurement.figures
        reasons = [f"{name} is not known: {figure.reason}" for name, figure in unknown.items() if figure.reason]
        return "\n".join([self.table().rstrip(), *comparison.not_measured(self.result), *reasons, *self.warnings])


def study_of(
    axes: Mapping[str, Sequence[Any]], cycles: int, order: str | None, stop_after_failures: int | None
) -> dict[str, Any]:
    """Of a job: its study, or nothing where one thing is measured once. Raises ValueError."""
    asked = _given(order=order, stop_after_failures=stop_after_failures)
    if not axes and cycles == 1:
        if asked:
            raise ValueError(f"{', '.join(asked)}: one thing is measured once; vary something, or give cycles")
        return {}
    points: dict[str, Any] = {"axes": dict(axes)} if axes else {"experiments": [{}]}
    return {"study": {"type": "grid", **points, "cycles": cycles, **asked}}


def _split(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The config, with the first of several values, and the axes that they make. Raises TypeError."""
    config: dict[str, Any] = {}
    axes: dict[str, list[Any]] = {}
    for field, value in fields.items():
        path = _path(field)
        if _is_list(value) and len(value) > 1:
            axes[f"config.{'.'.join(path)}"] = [_plain(each) for each in value]
        first = value[0] if _is_list(value) else value
        (config.setdefault("task", {}) if len(path) > 1 else config)[path[-1]] = _plain(first)
    return config, axes


def _path(field: str) -> tuple[str, ...]:
    if field in MeasurementConfig.model_fields:
        return (field,)
    if field in Task.model_fields:
        return "task", field
    raise TypeError(f"{field}: {unknown_field(field, [*MeasurementConfig.model_fields, *Task.model_fields])}")


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json", exclude_unset=True) if isinstance(value, RandomModel) else value


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _measured(client: "Client", job: JobSpec, progress: bool) -> MeasurementStudy:
    submitted = client.submit(job)
    client.wait(submitted.id, progress=progress)
    results = client.results(submitted.id)
    content = results.content
    if isinstance(content, GridResult):
        study = MeasurementStudy(results.operation, content)
    elif isinstance(content, MeasurementResult):
        study = MeasurementStudy(results.operation, _alone(results.operation, content), content)
    else:
        raise RuntimeError(_failure(results))
    if not any(row.status is Status.COMPLETED for row in study.rows):
        raise RuntimeError("; ".join([_failure(results), *comparison.not_measured(study.result)]))
    return study


def _alone(operation: Operation, content: MeasurementResult) -> GridResult:
    """One measurement as a study of one."""
    known = content.values()
    row = GridRow(
        operation_id=operation.id, name=operation.name, point={}, cycle=0, status=operation.status, final=known
    )
    group = GridGroup(point={}, metrics={name: Statistic(n=1, mean=value) for name, value in known.items()})
    return GridResult(rows=[row], groups=[group], warnings=list(content.warnings))


def _failure(results: "Results") -> str:
    operation = results.operation
    why = f": {operation.error.code}: {operation.error.message}" if operation.error else ""
    return f"{operation.name} ({operation.id}) {operation.status} without a measurement{why}"

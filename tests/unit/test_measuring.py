"""A measurement's attempt in its trainer process: what it tells its agent, how it ends, and when it counts as hung."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import pytest

from helpers.measurement_jobs import GPT2
from ops_contract.agents import StartTraining
from ops_contract.energy import Use
from ops_contract.jobs import Execution, Job
from ops_contract.lifecycle import Kind, Outcome
from ops_contract.measurements import FlopsRecord, MeasurementConfig, MeasurementPhase, MeasurementProgress
from ops_contract.pipe import Alive, Mark, ProgressNow, RunJob
from ops_contract.reports import ArtifactSaved, Finish, Result, Started
from ops_worker import measuring
from ops_worker.measurement.engines import Checked, Generated
from ops_worker.processes import gets_on

QUICK: dict[str, Any] = {
    "model": GPT2,
    "task": {"n_prompts": 6, "input_tokens": 4, "output_tokens": 8},
    "batch_size": 4,
    "warmup": {"batches": 1, "cv": None},
    "thermal_floor_s": 0,
    "baseline": {"strategy": "none"},
    "first_token_prompts": 0,
}


class Engine:
    """Two batches, of 4 prompts and of 2; `at_batch` is called before each of the window."""

    def __init__(
        self, at_batch: Callable[[int], object] = lambda batch: None, failures: Sequence[str] = (), broken: str = ""
    ) -> None:
        self._at_batch = at_batch
        self._failures = failures
        self._broken = broken
        self._in_window = False
        self.closed = False

    batches = 2

    def check(self, gpu_free_bytes: int | None) -> Checked:
        return Checked(self._failures, ["it is warm here"] if self._failures else [])

    def environment(self) -> dict[str, Any]:
        return {"engine": "fake"}

    def load(self) -> None:
        if self._broken:
            raise RuntimeError(self._broken)

    def prompts(self, batch: int) -> int:
        return (4, 2)[batch]

    def generate(self, batch: int) -> Generated:
        if self._in_window:
            self._at_batch(batch)
        return Generated(4 * self.prompts(batch), 8 * self.prompts(batch))

    def first_token(self, batch: int) -> None: ...

    def reset_peak_memory(self) -> None:
        self._in_window = True

    def peak_memory_bytes(self) -> int | None:
        return 1

    def flops(self, generated: Sequence[Generated]) -> FlopsRecord:
        return FlopsRecord(prefill=1.0, decode=2.0, params=3)

    def peak_flops_per_s(self) -> tuple[float | None, str]:
        return None, "nobody knows"

    def close(self) -> None:
        self.closed = True


class Agent:
    """What it was told; it may say to stop."""

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.why: Literal["cancelled", "preempted"] | None = None
        self.report = self.mark = self.said.append

    def alive(self) -> None:
        self.said.append(Alive())

    def progress(self, progress: Any) -> None:
        self.said.append(ProgressNow(progress=progress))

    def all(self, kind: type) -> list[Any]:
        return [message for message in self.said if isinstance(message, kind)]


@pytest.fixture(autouse=True)
def _leave_the_process_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """This one is no trainer: it goes on to other tests."""
    monkeypatch.setattr(measuring, "_unhindered", lambda job: None)


def run(
    tmp_path: Path, engine: Engine, agent: Agent | None = None, changes: dict[str, Any] | None = None, **job: Any
) -> tuple[Finish, Agent]:
    agent = agent or Agent()
    order = StartTraining(
        incarnation=uuid4(),
        operation_id=uuid4(),
        attempt=1,
        slots=[0],
        deadline_s=9,
        job=Job(kind=Kind.MEASUREMENT, workload="measurement", config=QUICK | (changes or {}), execution=Execution()),
    )
    (tmp_path / "attempt").mkdir(exist_ok=True)
    sent = RunJob(
        start=order,
        storage_root=str(tmp_path),
        directory=str(tmp_path / "attempt"),
        device="cpu",
        cores=1,
        baselines=str(tmp_path / "baselines"),
        **job,
    )
    return measuring.run(sent, agent, lambda config, device: engine), agent  # type: ignore[arg-type, return-value]


def test_the_window_is_the_use_of_its_joules_and_its_units_are_generated_tokens(tmp_path: Path) -> None:
    finish, agent = run(tmp_path, Engine())

    assert finish == Finish(outcome=Outcome.COMPLETED)
    assert isinstance(agent.said[0], Started)
    assert (agent.said[0].exactness.promise, agent.said[0].start_step) == ("best_effort", 0)
    marks = [mark for mark in agent.all(Mark) if mark.use is not mark.then]
    assert [(mark.use, mark.then, mark.step, mark.units) for mark in marks] == [
        (Use.STARTUP, Use.TRAIN, 0, 0),
        (Use.TRAIN, Use.FINISH, 6, 48),
    ]
    [result] = [report.content for report in agent.all(Result)]
    assert result.config_hash == MeasurementConfig.model_validate(QUICK).digest()
    assert (result.tokens_out, result.figures["energy_j"].value) == (48, None)
    assert result.figures["energy_j"].reason
    told = agent.all(ProgressNow)[-1].progress
    assert (told.step, told.steps_total, told.measurement.phase) == (6, 6, MeasurementPhase.COMPUTE)
    between_marks_s = marks[1].at_s - marks[0].at_s
    assert result.figures["window_s"].value <= between_marks_s


def test_its_samples_are_an_artifact_that_its_result_names(tmp_path: Path) -> None:
    paused = threading.Event()

    finish, agent = run(tmp_path, Engine(at_batch=lambda batch: paused.wait(0.15)), cpu_power_w=10.0)

    [saved], [report] = agent.all(ArtifactSaved), agent.all(Result)
    assert finish.outcome is Outcome.COMPLETED
    assert report.content.series == saved.name == "files/series.parquet"
    assert (tmp_path / saved.path).read_bytes()[:4] == b"PAR1"
    assert agent.said.index(saved) < agent.said.index(report)
    assert report.content.figures["energy_j"].value == pytest.approx(
        10.0 * report.content.figures["window_s"].value, rel=1e-6
    )


def test_what_keeps_it_from_starting_is_told_at_once_and_not_tried_again(tmp_path: Path) -> None:
    finish, _ = run(tmp_path, Engine(failures=["no memory", "no model"]))

    assert (finish.outcome, finish.permanent) == (Outcome.FAILED, True)
    assert finish.error
    assert (finish.error.code, finish.error.details) == (
        "preflight_failed",
        {"failures": ["no memory", "no model"], "warnings": ["it is warm here"]},
    )
    assert "for 2 reasons: no memory; no model" in finish.error.message


def test_a_named_meter_that_is_not_there_is_one_of_them(tmp_path: Path) -> None:
    finish, _ = run(tmp_path, Engine(), changes={"meter": "nvml_counter"})
    assert finish.error
    assert finish.error.code == "preflight_failed"
    assert "nvml_counter" in finish.error.details["failures"][0]


def test_an_engine_that_fails_says_in_which_phase_and_may_be_tried_again(tmp_path: Path) -> None:
    engine = Engine(broken="CUDA out of memory")

    finish, agent = run(tmp_path, engine)

    assert (finish.outcome, finish.permanent) == (Outcome.FAILED, False)
    assert finish.error
    assert (finish.error.code, finish.error.details["phase"]) == ("engine_failed", "load")
    assert "in load\n" in finish.error.details["traceback"]
    assert engine.closed
    assert agent.all(Result) == []


@pytest.mark.parametrize("why", ["cancelled", "preempted"])
def test_a_stop_within_the_window_is_heeded_before_the_next_batch(
    tmp_path: Path, why: Literal["cancelled", "preempted"]
) -> None:
    agent, batches = Agent(), list[int]()

    def stop(batch: int) -> None:
        batches.append(batch)
        agent.why = why

    engine = Engine(at_batch=stop)
    finish, _ = run(tmp_path, engine, agent)

    assert finish == Finish(outcome=Outcome(why))
    assert (batches, engine.closed, agent.all(Result)) == ([0], True, [])


def test_a_stop_while_it_is_idle_is_heeded_too(tmp_path: Path) -> None:
    agent = Agent()
    agent.why = "cancelled"
    finish, _ = run(tmp_path, Engine(), agent, changes={"gap_s": 3600})
    assert finish == Finish(outcome=Outcome.CANCELLED)


class Standing:
    """A measurement that got to its second batch."""

    tokens_out = 0

    def __init__(self) -> None:
        self.beats = 5

    def progress(self) -> MeasurementProgress:
        return MeasurementProgress(phase=MeasurementPhase.WINDOW, done=4, total=6, unit="prompts", power_w=99.5)


def test_it_is_alive_only_while_it_gets_on_though_it_tells_where_it_stands(tmp_path: Path) -> None:
    agent, standing = Agent(), Standing()
    telling = measuring.Telling(agent, 6)  # type: ignore[arg-type]
    telling._measurement = standing  # type: ignore[assignment]

    telling.tell()
    telling.tell()

    assert len(agent.all(Alive)) == 1
    first, second = agent.all(ProgressNow)
    assert first == second
    assert (first.progress.step, first.progress.steps_total, first.progress.epoch) == (4, 6, None)
    assert first.progress.measurement.power_w == 99.5
    assert [gets_on(message) for message in (Alive(), first)] == [True, False]
    standing.beats += 1
    telling.tell()
    assert len(agent.all(Alive)) == 2


def test_what_it_tells_while_it_works_cuts_what_the_agent_books(tmp_path: Path) -> None:
    """The agent's meters keep their readings for a bounded time."""
    agent, standing = Agent(), Standing()
    telling = measuring.Telling(agent, 6)  # type: ignore[arg-type]
    telling._measurement = standing  # type: ignore[assignment]
    telling.tell()
    telling.entered(MeasurementPhase.WINDOW)
    telling.tell()
    standing.tokens_out = 48
    telling.entered(MeasurementPhase.COMPUTE)
    assert [(m.use, m.then, m.step, m.units) for m in agent.all(Mark)] == [
        (Use.STARTUP, Use.STARTUP, 4, 0),
        (Use.STARTUP, Use.TRAIN, 4, 0),
        (Use.TRAIN, Use.TRAIN, 4, 0),
        (Use.TRAIN, Use.FINISH, 6, 48),
    ]

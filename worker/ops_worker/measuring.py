"""A measurement's attempt: runs it, and tells the agent what its time goes to and how it gets on."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from time import monotonic

import torch

from ops_contract.energy import Use
from ops_contract.lifecycle import Outcome
from ops_contract.measurements import MeasurementConfig, MeasurementPhase, MeasurementResult
from ops_contract.pipe import Mark, RunJob
from ops_contract.reports import Exactness, Fault, Finish, Progress, Result, Started
from ops_worker import artifacts
from ops_worker.measurement.engines import Engine
from ops_worker.measurement.instruments import open_instruments
from ops_worker.measurement.run import BackendError, Measurement, PreFlightError
from relight.pipe import AgentPipe, Why
from relight.training import numerics
from relight.training.faults import fault, plain_text, traceback_of

SERIES = "series.parquet"
TELL_S = 1.0
_INEXACT = "a measurement differs from run to run; one that is resumed is made again, from the beginning"
# What is measured is what the joules were for; all else of it is overhead.
_USES = {
    MeasurementPhase.WINDOW: Use.TRAIN,
    MeasurementPhase.FIRST_TOKEN: Use.FINISH,
    MeasurementPhase.COMPUTE: Use.FINISH,
}


class Stopped(Exception):
    """It was told to stop, between two batches or phases."""

    def __init__(self, why: Why) -> None:
        super().__init__(why)
        self.why = why


def pytorch(config: MeasurementConfig, device: str) -> Engine:
    from ops_worker.measurement.pytorch import PytorchEngine

    return PytorchEngine(config, device)


def run(job: RunJob, agent: AgentPipe, engine: Callable[[MeasurementConfig, str], Engine] = pytorch) -> Finish:
    """Raises OSError where its samples cannot be kept."""
    config = MeasurementConfig.model_validate(job.start.job.config)
    _unhindered(job)
    agent.report(_started(job))
    try:
        result = _measured(job, config, engine(config, job.device), agent)
    except Stopped as stopped:
        return Finish(outcome=Outcome(stopped.why))
    except PreFlightError as error:
        return Finish(outcome=Outcome.FAILED, permanent=True, error=_preflight_failed(error))
    except BackendError as error:
        where, trace = f"{error}; details.traceback says where", traceback_of(error.cause)
        told = fault("engine_failed", where, phase=error.phase, traceback=trace)
        return Finish(outcome=Outcome.FAILED, error=told)
    agent.report(Result(content=_with_series(job, result, config.task.n_prompts, agent)))
    return Finish(outcome=Outcome.COMPLETED)


def _unhindered(job: RunJob) -> None:
    """A warm trainer is set up for steps that can be repeated bit for bit, which costs time and memory."""
    numerics.configure(job.start.job.execution.threads or job.cores, deterministic=False)
    if "CUBLAS_WORKSPACE_CONFIG" not in job.environ:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def _started(job: RunJob) -> Started:
    # Not asked of the GPU: that would wake it before its idle power is measured. The agent says which one it is.
    environment = numerics.environment(torch.device("cpu")) | {"accelerator": job.device}
    exactness = Exactness(promise="best_effort", reasons=[_INEXACT])
    return Started(trainer_pid=os.getpid(), start_step=0, exactness=exactness, environment=environment)


def _measured(job: RunJob, config: MeasurementConfig, engine: Engine, agent: AgentPipe) -> MeasurementResult:
    telling = Telling(agent, config.task.n_prompts)
    with open_instruments(job.device_uuid, config.meter, job.cpu_power_w, job.cores) as instruments:
        measurement = Measurement(
            config,
            engine,
            instruments,
            baselines=Path(job.baselines or job.directory),
            series=Path(job.directory) / SERIES,
            entered=telling.entered,
            stop=telling.stop,
        )
        with telling.of(measurement):
            return measurement.run()


def _preflight_failed(error: PreFlightError) -> Fault:
    count = len(error.failures)
    said = "; ".join(error.failures)
    told = fault("preflight_failed", f"It cannot be measured here, for {count} reason{'s' * (count > 1)}: {said}")
    details = {"failures": error.failures, "warnings": error.warnings}
    return told.model_copy(update={"details": {name: [plain_text(t) for t in said] for name, said in details.items()}})


def _with_series(job: RunJob, result: MeasurementResult, step: int, agent: AgentPipe) -> MeasurementResult:
    """Its samples published, and called as the artifact is."""
    if result.series is None:
        return result
    [saved] = artifacts.published(job, step, Path(job.directory), [PurePosixPath(SERIES)], agent)
    agent.report(saved)
    return result.model_copy(update={"series": saved.name})


class Telling:
    """`entered` and `stop` are called by the thread that measures; a thread of its own tells how far it is."""

    def __init__(self, agent: AgentPipe, n_prompts: int) -> None:
        self._agent = agent
        self._n_prompts = n_prompts
        self._use = Use.STARTUP
        self._step = 0
        self._beats = 0
        self._marking = threading.Lock()

    @contextmanager
    def of(self, measurement: Measurement) -> Iterator[None]:
        self._measurement = measurement
        over = threading.Event()
        thread = threading.Thread(target=self._keep_telling, args=(over,), name="telling", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        # How far it came in the end.
        self.tell()

    def stop(self) -> None:
        """Raises Stopped; it is asked within the window, and costs as much as a flag."""
        if (why := self._agent.why) is not None:
            raise Stopped(why)

    def entered(self, phase: MeasurementPhase) -> None:
        self.stop()
        self._mark(_USES.get(phase, Use.STARTUP))

    def tell(self) -> None:
        """Alive is who has got on since it was told last: this thread would live on beside one that hangs."""
        if (beats := self._measurement.beats) > self._beats:
            self._beats = beats
            self._agent.alive()
        told = self._measurement.progress()
        if told.phase is MeasurementPhase.WINDOW:
            self._step = int(told.done)
        self._agent.progress(Progress(step=self._step, steps_total=self._n_prompts, epoch=None, measurement=told))
        # The agent's meters forget: what it books must not be too long ago.
        self._mark()

    def _keep_telling(self, over: threading.Event) -> None:
        while not over.wait(TELL_S):
            self.tell()

    def _mark(self, then: Use | None = None) -> None:
        with self._marking:
            use, self._use = self._use, then or self._use
            units = 0
            if use is Use.TRAIN and self._use is Use.FINISH:
                self._step, units = self._n_prompts, self._measurement.tokens_out
            self._agent.mark(Mark(at_s=monotonic(), use=use, then=self._use, step=self._step, units=units))

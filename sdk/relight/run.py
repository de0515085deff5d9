"""`relight.Run`: a training loop of one's own that goes on where it died, bit for bit."""

import atexit
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from os import PathLike, environ
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from ops_contract.energy import Use
from ops_contract.jobs import COMMAND, CheckpointEvery, Execution
from ops_contract.lifecycle import CheckpointType, Phase
from ops_contract.reports import Note
from relight.manifest import CheckpointCorrupt, CheckpointMissing, Manifest
from relight.training import beginning, changes, numerics
from relight.training.directory import Directory
from relight.training.faults import TrainingFault, finish_of
from relight.training.final import publish_model
from relight.training.interval import Pace
from relight.training.loop import STOPPED_BY
from relight.training.marks import Marks
from relight.training.monitor import Monitor
from relight.training.order import DataOrder
from relight.training.place import Place, Service
from relight.training.randomness import Stream, derive, seed_everything
from relight.training.reporting import Reporter
from relight.training.saving import Saver
from relight.training.source import script_files
from relight.training.state import Cursor, Live, check_round_trip
from relight.workload import Stateful

_DESCRIPTOR = "RELIGHT_FD"


class Run:
    """What a loop has to say so that it can be killed at any moment:

        run = relight.Run(model=model, optimizer=optimizer, scheduler=scheduler, data=loader)
        for epoch in run.epochs(10):
            for x, y in run.batches():
                ...
                run.report(loss=loss)
            run.report(val_loss=evaluate(model))

    Made when everything else is: it puts back what the newest checkpoint has. A loop that draws its own batches gives
    no data and has `for step in run.steps(1000)`. One turn of the innermost loop is a step.

    What must survive is in `model`, `optimizer`, `scheduler`, `scaler` and `state` (by name, anything with
    `state_dict` and `load_state_dict`). Torch's, numpy's and Python's global generators are seeded from `seed` and the
    step, and for each sample. `data` is a DataLoader; its samples come in an order by `seed` and epoch.

    As a command of the service it is the operation's; else everything is in files under `directory`.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler | ReduceLROnPlateau | None = None,
        scaler: GradScaler | None = None,
        data: DataLoader[Any] | None = None,
        state: Mapping[str, Stateful] | None = None,
        seed: int = 0,
        checkpoint_every: CheckpointEvery | Mapping[str, float] | Literal["auto"] = "auto",
        deterministic: bool = True,
        data_digest: str | None = None,
        directory: str | PathLike[str] = "relight-run",
    ) -> None:
        """`data_digest` names the data, where the number of samples says too little: a run does not go on with other.

        Raises TrainingFault, CheckpointCorrupt, and TypeError or ValueError for what it cannot work with.
        """
        # Read back as the job's fields of these names are.
        self._knobs = Execution.model_validate(
            {"seed": seed, "checkpoint_every": checkpoint_every, "deterministic": deterministic}
        )
        self._order = _order(data, seed) if data is not None else None
        self._own = _Own(model, _settings(seed, self._order))
        registered = {"relight": self._own, **_stateful(state or {})}
        self._live = Live(model, optimizer, scheduler, registered, Monitor(self._knobs), scaler)
        self._device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self._data_digest = data_digest
        self._inexact: list[str] = []
        self._cursor = Cursor()
        self._reports_to: int | None = None
        self._updated = True  # since the last boundary; one step may only gather gradients
        self._is_due = False
        self._round_trip_checked = False
        self.done = False
        self._stack = ExitStack()
        self._place: Place = (
            Service(int(environ[_DESCRIPTOR])) if _DESCRIPTOR in environ else Directory(Path(directory))
        )
        try:
            with self._last_words():
                self._restore()
        except BaseException:
            self.close()
            raise

    @property
    def step(self) -> int:
        """The one that runs, or is next; from 0."""
        return self._cursor.step

    def epochs(self, n: int) -> Iterator[int]:
        """What is left of the epochs 0 to n - 1, each with its `batches()`."""
        if self._order is None:
            raise ValueError("run.epochs() needs Run(data=…); without data, use run.steps(n)")
        self._begin(n * len(self._order))
        while self._cursor.epoch < n and not self._own.ended:
            self._marks.epoch = self._cursor.epoch
            yield self._cursor.epoch
            self._end_epoch(last=self._cursor.epoch + 1 == n or self._own.ended)
        self._complete()

    def batches(self) -> Iterator[Any]:
        """What is left of the epoch's batches, as the loader's collate_fn made them; nothing of the others is read."""
        if self._order is None or self._reporter is None:
            raise ValueError("run.batches() is for within `for epoch in run.epochs(n)`")
        cursor = self._cursor
        if cursor.phase is Phase.EVALUATE:
            self._begin_evaluation()
            return
        for batch in self._order.training(cursor.epoch, cursor.samples_in_epoch):
            self._begin_step()
            yield batch.data
            self._end_update(batch.samples)
            if self._cursor.samples_in_epoch < self._order.samples:
                self._go_on()
        self._cursor = self._cursor._replace(phase=Phase.EVALUATE)
        self._stop_if_asked()
        self._begin_evaluation()

    def steps(self, n: int) -> Iterator[int]:
        """What is left of the steps 0 to n - 1, each under its own seed."""
        if self._order is not None:
            raise ValueError("run.steps() is for a Run without data; with it, use run.epochs(n) and run.batches()")
        self._begin(n)
        while self._cursor.step < n and not self._own.ended:
            self._begin_step()
            yield self._cursor.step
            self._end_update(0)
            self._go_on(last=self._cursor.step + 1 == n or self._own.ended)
        self._complete()

    def report(self, **metrics: Tensor | float) -> None:
        """Scalars of this step; between the last batch and the next epoch, of the epoch's last step; after the loop, of
        the step after the last. A tensor stays on its device until reports are sent, some steps later."""
        if self._reports_to is None or self._reporter is None:
            raise ValueError("run.report() is for within the loop, or after it")
        if taken := {"step", "epoch", "learning_rate"} & metrics.keys():
            raise ValueError(f"Run reports {', '.join(sorted(taken))} itself; give another name")
        self._reporter.add(self._reports_to, metrics)
        if self.done:
            self._reporter.flush(self._cursor)

    def end(self) -> None:
        """This epoch, or this step of `steps()`, is the last: early stopping. A mere `break` leaves it unfinished."""
        self._own.ended = True

    def close(self) -> None:
        """Give up directory and signals before the process ends, as a notebook may want to."""
        self._stack.close()
        self._place.close()

    def _restore(self) -> None:
        begun_at_s = time.monotonic()
        self._marks = Marks(self._place, self._device)
        with self._marks.doing(Use.RESTORE, self._cursor):
            before, tree = self._place.restored() or (None, None)
        restored_s = time.monotonic() - begun_at_s
        threads = beginning.threads(self._place.threads, before, self._place.cores or torch.get_num_threads())
        numerics.configure(threads, self._knobs.deterministic)
        self._stack.enter_context(numerics.operators_noted(self._note_inexact))
        about = self._about = self._manifest()
        if before is not None and tree is not None:
            self._inexact += changes.accepted(before, about, self._place.accept_changes, self._place.accepting)
            self._cursor = Cursor.from_tree(tree["cursor"])
            with self._marks.doing(Use.RESTORE, self._cursor):
                self._live.restore(tree)
            self._inexact += self._own.differences(tree["state"]["relight"]["settings"])
        if not about.code_files:
            self._inexact.append("no file with the code was found, so a change of it would not be noticed")
        self._before, self._again = before, dict(tree["reported"]) if tree else {}
        saved = self._cursor if before else None
        self._saver = Saver(
            self._place.root, about, self._live, self._place, self._marks, saved=saved, restored_s=restored_s
        )
        self._pace = Pace(
            self._knobs.checkpoint_every, self._place.record, self._saver.times, time.monotonic, self._note
        )
        self._reporter: Reporter | None = None

    @contextmanager
    def _last_words(self) -> Iterator[None]:
        """So that an operation says in its own words why its command failed, and whether another try is of use."""
        try:
            yield
        except (TrainingFault, CheckpointMissing, CheckpointCorrupt) as error:
            self._place.report(finish_of(error))
            raise

    def _begin(self, steps_total: int) -> None:
        if self._reporter is not None:
            raise ValueError("a Run has one loop; make another Run, with another directory, for another one")
        self._reporter = Reporter(self._place, steps_total, time.monotonic)
        self._reporter.add_again(self._cursor.step, self._again)
        # An update may not begin before a snapshot of the boundary before it is whole.
        before = self._live.optimizer.register_step_pre_hook(lambda *_: self._saver.seal())
        after = self._live.optimizer.register_step_post_hook(self._note_update)
        self._stack.callback(before.remove)
        self._stack.callback(after.remove)
        self._stack.callback(self._saver.close)
        atexit.register(self._stack.close)
        self._place.report(
            beginning.started(
                self._about,
                self._before,
                self._cursor.step,
                self._knobs,
                self._device,
                self._inexact,
                more={"data_digest": self._about.data_digest},
            )
        )
        if self._before is None:
            self._save(CheckpointType.INITIAL)
        else:
            self._marks.mark(self._cursor, then=Use.TRAIN)
        if self._cursor.step < steps_total and not self._own.ended:
            self._stop_if_asked()

    def _begin_step(self) -> None:
        cursor = self._cursor
        self._reports_to, self._updated = cursor.step, False
        self._learning_rate = float(self._live.optimizer.param_groups[0]["lr"])
        # After the fetch: in this process it drew from the same generators, in a loader process it did not.
        seed_everything(derive(self._knobs.seed, Stream.TRAIN, cursor.step, 0, 0))

    def _begin_evaluation(self) -> None:
        self._reports_to = self._cursor.step
        self._marks.mark(self._cursor, then=Use.EVALUATE)
        seed_everything(derive(self._knobs.seed, Stream.EVALUATE, self._cursor.step, 0, 0))

    def _end_update(self, samples: int) -> None:
        assert self._reporter is not None
        cursor = self._cursor
        self._reporter.add_step(cursor.step, cursor.epoch, self._learning_rate, samples)
        self._marks.add(samples)
        self._cursor = cursor.after(samples, units=None)  # the loop does not say what it trained on
        if self._updated and not self._round_trip_checked:
            with self._last_words():
                check_round_trip(self._live)
            self._round_trip_checked = True

    def _end_epoch(self, last: bool) -> None:
        if self._reports_to is None:
            raise ValueError("an epoch went by without run.batches(); draw batches from it, or use run.steps(n)")
        if self._cursor.phase is Phase.UPDATE:
            self._end_update(0)  # the loop broke off in this step, and with it ends the epoch
        self._cursor = self._cursor._replace(phase=Phase.UPDATE, epoch=self._cursor.epoch + 1, samples_in_epoch=0)
        self._go_on(epoch_ends=True, last=last)

    def _go_on(self, epoch_ends: bool = False, last: bool = False) -> None:
        """The boundary after a step. A checkpoint falls only where no gradients are being gathered."""
        assert self._reporter is not None
        cursor = self._cursor = self._cursor._replace(step=self._cursor.step + 1)
        self._reports_to = None
        if self._reporter.flush_if_due(cursor) or epoch_ends:
            self._marks.mark(cursor, then=Use.TRAIN)
        self._saver.raise_failure()
        self._is_due |= self._pace.is_due_at(cursor.step, cursor.epoch, epoch_ends)
        if last:
            return
        self._stop_if_asked()
        if self._is_due and self._updated:
            self._is_due = False
            self._save(CheckpointType.PERIODIC)

    def _stop_if_asked(self) -> None:
        if (why := self._place.should_stop()) and self._updated:
            self._save(STOPPED_BY[why])
            self._stack.close()
            self._place.leave()

    def _save(self, why: CheckpointType) -> None:
        assert self._reporter is not None
        # Everything before the checkpoint's step is sent before the checkpoint: what it resumes from is complete.
        self._reporter.flush(self._cursor)
        reported = self._reporter.newest(self._cursor.step) if self._cursor.phase is Phase.EVALUATE else {}
        self._saver.save(why, self._cursor, reported)

    def _complete(self) -> None:
        self._save(CheckpointType.FINAL)
        self._marks.mark(self._cursor, then=Use.FINISH)
        step, place = self._cursor.step, self._place
        if not place.has_model(step):
            place.report(publish_model(place.root, place.operation_id, place.attempt, step, self._live.model))
        self._marks.mark(self._cursor)
        self._stack.close()
        place.over()
        self.done, self._reports_to = True, step

    def _note_update(self, *_: object) -> None:
        self._updated = True

    def _note(self, message: str) -> None:
        self._place.report(Note(message=message))

    def _note_inexact(self, reason: str) -> None:
        self._inexact.append(reason)
        self._place.report(beginning.inexact_operator(reason))

    def _manifest(self) -> Manifest:
        return beginning.manifest(
            script_files(),
            operation_id=self._place.operation_id,
            attempt=self._place.attempt,
            workload=COMMAND,
            data_digest=self._data_digest,
            training_samples=None if self._order is None else len(self._order.dataset),
            numerics=numerics.fingerprint(self._device),
        )


class _Own:
    """What a Run keeps beside the user's objects: whether it has ended before its time, the settings that decide its
    bits, and which modules are in evaluation mode, as a loop may set them once."""

    def __init__(self, model: nn.Module, settings: dict[str, Any]) -> None:
        self.ended = False
        self._model = model
        self._settings = settings

    def differences(self, before: dict[str, Any]) -> list[str]:
        """In words; a script may have its settings from the command line."""
        pairs = [(name, before.get(name), value) for name, value in self._settings.items()]
        return [f"{name} was {was} and is {value}" for name, was, value in pairs if was != value]

    def state_dict(self) -> dict[str, Any]:
        evaluating = [name for name, module in self._model.named_modules() if not module.training]
        return {"ended": self.ended, "settings": self._settings, "evaluating": evaluating}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ended = state["ended"]
        for name, module in self._model.named_modules():
            module.training = name not in state["evaluating"]


def _settings(seed: int, order: DataOrder | None) -> dict[str, Any]:
    if order is None:
        return {"seed": seed}
    return {"seed": seed, "batch_size": order.batch_size, "shuffle": order.shuffle, "drop_last": order.drop_last}


def _stateful(state: Mapping[str, Stateful]) -> Mapping[str, Stateful]:
    for name, kept in state.items():
        if not (hasattr(kept, "state_dict") and hasattr(kept, "load_state_dict")):
            raise TypeError(
                f"state[{name!r}] needs state_dict() and load_state_dict(); a {type(kept).__name__} has not"
            )
    return state


def _order(loader: DataLoader[Any], seed: int) -> DataOrder:
    """The loader's batches, in an order that can be gone on with. Raises TypeError, ValueError."""
    if not isinstance(loader, DataLoader):
        raise TypeError(f"data is a {type(loader).__name__}; give a torch DataLoader, which says the batch size too")
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "an IterableDataset has no positions to go on from; give a dataset with __getitem__ and __len__"
        )
    if type(loader.batch_sampler) is not BatchSampler or loader.batch_size is None:
        raise ValueError("Run makes the batches itself; give the DataLoader batch_size=n, and no batch_sampler")
    sampler: Any = loader.sampler
    dataset: Any = loader.dataset
    shuffles = type(sampler) is RandomSampler
    if not (shuffles or type(sampler) is SequentialSampler):
        raise ValueError(
            f"Run orders the samples itself, by seed and epoch; leave out sampler={type(sampler).__name__}"
        )
    if shuffles and (sampler.replacement or sampler.num_samples != len(dataset)):
        raise ValueError("Run draws every sample once an epoch; leave out the sampler, and give shuffle=True")
    for name in ("worker_init_fn", "generator"):
        if getattr(loader, name) is not None:
            raise ValueError(f"leave out {name}=: Run(seed=…) seeds the order and every sample")
    order = DataOrder(
        dataset,
        loader.collate_fn,
        seed,
        loader.batch_size,
        loader.num_workers,
        shuffles,
        loader.drop_last,
        loader.pin_memory,
    )
    if order.samples == 0:
        raise ValueError(f"the data have {len(order.dataset)} samples: not one batch of {order.batch_size}")
    return order

"""A trainer without torch: speaks the real pipe and does what the job's config says.

`reports` metrics `pause_s` apart, then `end`: finish, fault, wait, exit, crash, garbage, linger,
child (leaves one behind), daemon (leaves one in another session) or stand (tells for ever where a measurement stands).
`deaf`: ignores Stop. After its first step it waits until the file `gate` is there. With `edges` each step could be a
checkpoint's. `ranks` changes the config for some of a gang, by rank: there `end` may be peer_lost too, or stopped (as
if it had been told). With `meet` they meet at rank 0's socket.
"""

import argparse
import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from uuid import uuid4

from ops_contract.energy import Use
from ops_contract.lifecycle import CheckpointType, Outcome, Phase
from ops_contract.measurements import MeasurementPhase, MeasurementProgress
from ops_contract.pipe import STACKS_SIGNAL, Hello, Mark, ProgressNow, Rank, RunJob, Stop, line, to_trainer
from ops_contract.reports import (
    PEER_LOST,
    CheckpointSaved,
    Exactness,
    Fault,
    Finish,
    Metrics,
    Note,
    Progress,
    Series,
    Started,
)
from ops_contract.wire import Wire


class FakeTrainer:
    def __init__(self, in_fd: int, out_fd: int, gang_fd: int) -> None:
        self.commands = os.fdopen(in_fd, "rb")
        self.gang_fd = gang_fd
        self.out_fd = out_fd
        self.stop: Stop | None = None
        self.stopping = threading.Event()

    def run(self) -> None:
        self.say(Hello(pid=os.getpid()))
        first = self.commands.readline()
        if not first:
            os._exit(1)
        job = to_trainer.validate_json(first)
        assert isinstance(job, RunJob)
        config = dict(job.start.job.config)
        if job.rank is not None:
            config |= config.get("ranks", {}).get(str(job.rank.rank), {})
        threading.Thread(target=self.listen, args=(config.get("deaf", False),), daemon=True).start()
        self.train(job, config)

    def train(self, job: RunJob, config: dict) -> None:
        print(config.get("prints", "hello from the trainer"))
        if job.rank is not None:
            print(f"{job.rank.model_dump_json()} in {job.directory}, pid {os.getpid()}", flush=True)
        exactness = Exactness(promise="promised")
        environment = {"pid": os.getpid(), "secrets": [name for name in os.environ if name.startswith("OPS_")]}
        environment["sees"] = (os.environ | job.environ).get("CUDA_VISIBLE_DEVICES")
        if job.rank is not None and config.get("meet"):
            environment["met"] = self.meet(job.rank)
        self.say(Started(trainer_pid=os.getpid(), start_step=0, exactness=exactness, environment=environment))
        self.say(Mark(at_s=time.monotonic(), use=Use.STARTUP, then=Use.TRAIN, step=0, edge=True))
        for step in range(config.get("reports", 3)):
            if self.stopping.wait(config.get("pause_s", 0)):
                break
            self.say(Metrics(series=[Series.of("loss", [(step, 1 / (step + 1))])]))
            print("step", step, flush=True)
            self.say(ProgressNow(progress=Progress(step=step, loss=float("nan"))))
            at_s, edge = time.monotonic(), config.get("edges", False)
            self.say(Mark(at_s=at_s, use=Use.TRAIN, then=Use.TRAIN, step=step + 1, epoch=0, units=4, edge=edge))
            if step == config.get("poison_at"):
                self.say(Note(message="poison"))
            while "gate" in config and not os.path.exists(config["gate"]) and not self.stopping.wait(0.005):
                pass
        self.end(job, config.get("end", "finish"))

    def end(self, job: RunJob, how: str) -> None:
        if how == "wait":
            self.stopping.wait()
        elif how == "peer_lost":
            self.say(Finish(outcome=Outcome.PREEMPTED, error=Fault(code=PEER_LOST, message="closed by peer")))
            os._exit(0)
        elif how == "stopped":
            self.say(Finish(outcome=Outcome.PREEMPTED))
            os._exit(0)
        elif how == "fault":
            self.say(Finish(outcome=Outcome.FAILED, error=Fault(code="exception", message="LookupError: x")))
            os._exit(0)
        elif how == "exit":
            os._exit(3)
        elif how == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif how == "garbage":
            os.write(self.out_fd, b"no message\n")
            self.stopping.wait()
        elif how == "child":
            if (child := os.fork()) == 0:
                signal.pause()
            self.say(Note(message=str(child)))
            os._exit(3)
        elif how == "stand":
            stands = MeasurementProgress(phase=MeasurementPhase.WINDOW, done=1, total=4, unit="prompts", power_w=9.5)
            while not self.stopping.wait(0.05):
                self.say(ProgressNow(progress=Progress(step=1, steps_total=4, epoch=None, measurement=stands)))
        elif how == "daemon" and os.fork() == 0:
            os.setsid()  # out of the group, and with the pipe: what user code may leave behind
            os.read(self.commands.fileno(), 1)
            os._exit(0)
        if self.stop is not None:
            self.say(self.checkpoint(job))
        outcome = Outcome(self.stop.why) if self.stop else Outcome.COMPLETED
        if how != "daemon":
            self.say(Finish(outcome=outcome))
        if how == "linger":
            threading.Event().wait()
        os._exit(0)

    def meet(self, rank: Rank) -> list[int]:
        """The ranks that came to rank 0's socket."""
        if rank.rank > 0:
            with socket.create_connection((rank.host, rank.port)) as to_first:
                to_first.sendall(bytes([rank.rank]))
                to_first.recv(1)
            return []
        with socket.socket(fileno=os.dup(self.gang_fd)) as listener, contextlib.ExitStack() as stack:
            came = [stack.enter_context(listener.accept()[0]) for _ in range(rank.world_size - 1)]
            return sorted(other.recv(1)[0] for other in came)

    def checkpoint(self, job: RunJob) -> CheckpointSaved:
        return CheckpointSaved(
            checkpoint_id=uuid4(),
            checkpoint_type=CheckpointType.CANCEL,
            step=1,
            epoch=0,
            phase=Phase.UPDATE,
            path=f"{job.start.operation_id}/{job.start.attempt}-1",
            size_bytes=0,
            manifest_sha256="0" * 64,
        )

    def listen(self, deaf: bool) -> None:
        while message := self.commands.readline():
            if not deaf:
                self.stop = to_trainer.validate_json(message)
                self.stopping.set()
        os._exit(1)

    def say(self, message: Wire) -> None:
        os.write(self.out_fd, line(message))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--describe", action="store_true")
    parser.add_argument("--in-fd", type=int)
    parser.add_argument("--out-fd", type=int)
    parser.add_argument("--gang-fd", type=int)
    arguments = parser.parse_args()
    faulthandler.register(STACKS_SIGNAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if arguments.describe:
        print(json.dumps({"workloads": [{"name": "fake", "config_schema": {}}]}))
    else:
        FakeTrainer(arguments.in_fd, arguments.out_fd, arguments.gang_fd).run()


if __name__ == "__main__":
    sys.exit(main())

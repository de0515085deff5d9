"""From a SIGKILL to the next new step: of the trainer, of its agent, and of a script in a shell loop.

Ours is the service as `ops up` starts it, and its supervisor starts again what has ended. A training of steps of about
10 ms saves every 100 of them; half-way between two saves its trainer, or the agent, is killed. The steps write the
monotonic clock to a file when they are done: the time runs from the kill to the first step beyond the last one that
was done before it, so that what is done again is in it. Each kill meets an operation of its own, whose first failure it
is. The loop is `while ! python train.py; do :; done`, with the same model, data, steps and cadence, which saves by
torch.save, fsync and rename, loads what is there when it starts, and is killed at the same place. The killed agent's
attempt is lost when its lease has run out, which `--lease` sets; that is all that is not as `ops up` has it. Once more
it is killed where another agent waits.

    .venv/bin/python benchmarks/recovery.py
"""

import argparse
import os
import platform
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import lines
import psutil
from dispatch import Service, Step, command, eventually, service

PAUSE_S = 0.01
SAVE_EVERY = 100
HALF_WAY = 50
KILL_AT = 2 * SAVE_EVERY + HALF_WAY
ENDLESS = 10**6
BEYOND_LOOP_S, BEYOND_LEASE_S = 1.0, 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="at most, and none is begun after --seconds")
    parser.add_argument("--seconds", type=float, default=70.0, help="for one agent, and again for two")
    parser.add_argument("--lease", type=float, default=6.0, help="in seconds; 15 as it comes")
    lines.add_option(parser)
    given = parser.parse_args()
    environ = {"OPS_LEASE_S": str(given.lease)}
    with service(environ=environ) as running:
        alone = in_turn(
            given,
            {
                "trainer": lambda: trainer_killed_s(running),
                "loop": lambda: loop_killed_s(running),
                "agent": lambda: agent_killed_s(running),
            },
        )
    with service(workers=2, environ=environ) as running:
        beside = in_turn(given, {"agent": lambda: agent_killed_s(running)})
    goal_s = given.lease + BEYOND_LEASE_S
    found = [
        lines.beyond(
            "SIGKILL of the trainer → next new step",
            "a script in a shell loop",
            alone["trainer"],
            alone["loop"],
            "s",
            BEYOND_LOOP_S,
        ),
        lines.limit("SIGKILL of the only agent → next new step", alone["agent"], "s", goal_s),
        lines.limit("SIGKILL of one of two agents → next new step", beside["agent"], "s", goal_s),
    ]
    print(
        f"a lease of {given.lease:g} s; {len(alone['loop'])} rounds; {os.cpu_count()} cores, {platform.machine()}, "
        f"Python {platform.python_version()}; load {os.getloadavg()[0]:.1f}\n"
    )
    print(lines.table(found))
    lines.write(given.lines, found)


Ways = Mapping[str, Callable[[], float]]


def in_turn(given: argparse.Namespace, ways: Ways) -> dict[str, list[float]]:
    """As `lines.in_turn`, and once at least, for as long as there is time."""
    values: dict[str, list[float]] = {name: [] for name in ways}
    until_s = time.monotonic() + given.seconds
    for round in range(given.rounds):
        if round > 0 and time.monotonic() > until_s:
            break
        for name, value in lines.in_turn(1, ways).items():
            values[name] += value
    return values


def trainer_killed_s(running: Service) -> float:
    with training(running):
        return recovered_s(running, lambda pid: pid)


def agent_killed_s(running: Service) -> float:
    """Its trainer dies with it."""
    with training(running):
        return recovered_s(running, lambda pid: psutil.Process(pid).ppid())


@contextmanager
def training(running: Service) -> Iterator[None]:
    """Of the service, when every agent has a warm trainer."""
    running.wait_warm(len(running.stack.workers))
    running.steps.forget()
    config = {"out": str(running.steps.path), "pause_s": PAUSE_S}
    id, _ = running.submit(config, max_steps=ENDLESS, checkpoint_every={"steps": SAVE_EVERY})
    yield
    running.cancel(id)


def loop_killed_s(running: Service) -> float:
    running.wait_warm(len(running.stack.workers))
    running.steps.forget()
    state = running.code / "state.pt"
    state.unlink(missing_ok=True)
    script = shlex.join(command(running, running.steps.path, ENDLESS, PAUSE_S, state, SAVE_EVERY))
    loop = subprocess.Popen(["sh", "-c", f"while ! {script}; do :; done"], start_new_session=True)
    try:
        return recovered_s(running, lambda pid: pid)
    finally:
        os.killpg(loop.pid, signal.SIGKILL)
        loop.wait()


def recovered_s(running: Service, victim: Callable[[int], int]) -> float:
    """Kill what `victim` says for the process of the training, half-way between two saves."""

    def there() -> Step | None:
        done = running.steps.read()[-1:]
        return next((step for step in done if step.number >= KILL_AT and step.number % SAVE_EVERY >= HALF_WAY), None)

    first: Step = eventually(there, f"{KILL_AT} steps are done", running.turn)
    pid = victim(first.pid)
    killed_s = time.monotonic()
    os.kill(pid, signal.SIGKILL)

    def new() -> Step | None:
        done = running.steps.read()
        last = max(step.number for step in done if step.pid == first.pid)
        return next((step for step in done if step.number > last), None)

    found: Step = eventually(new, "a new step is done", running.turn)
    return found.at_s - killed_s


if __name__ == "__main__":
    main()

"""A Slurm of our own, of two nodes on this host: munged, slurmctld and two slurmd, that end with the test."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "sinfo", "srun")
_LISTEN_S = 30.0
CPUS = 2

# `low` is preempted by `high`: SIGTERM first, then, after GraceTime, it ends and waits again (REQUEUE) unless its
# batch script said that it is not to (`--no-requeue`), when it is cancelled.
_CONF = """
ClusterName=relight
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
AuthType=auth/munge
AuthInfo=socket={munge}
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptExemptTime=0
KillWait=20
MinJobAge=5
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=30
InactiveLimit=0
{gres}
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1_port} CPUs={cpus} RealMemory=4000 {node_gres}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2_port} CPUs={cpus} RealMemory=4000 {node_gres}
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=20
PartitionName=high Nodes=n1,n2 Default=NO MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why it cannot be had here."""
    if os.geteuid() != 0:
        return "needs root: munged and slurmd of its own"
    absent = [name for name in _PROGRAMS if shutil.which(name, path=_path()) is None]
    return f"needs Slurm (apt install slurm-wlm munge): no {', '.join(absent)}" if absent else None


class Slurm:
    """`environ` is what its commands need; `run` runs one of them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._conf = directory / "slurm.conf"
        self._munge = directory / "munge.socket"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environ = {"SLURM_CONF": str(self._conf), "PATH": _path()}

    def start(self) -> None:
        for part in ("state", "spool-n1", "spool-n2"):
            (self.directory / part).mkdir()
        self._start_munge()
        self._ports = dict(zip(("ctld_port", "n1_port", "n2_port"), _free_ports(3), strict=True))
        self._conf.write_text(
            _CONF.format(
                host=socket.gethostname(),
                directory=self.directory,
                munge=self._munge,
                cpus=CPUS,
                gres="",
                node_gres="",
                **self._ports,
            )
        )
        self.start_controller()
        for node in ("n1", "n2"):
            self._spawn(node, "slurmd", "-D", "-N", node)
        self.until(lambda: self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split() == ["idle"] * 2, "nodes idle")

    def start_controller(self) -> None:
        self._spawn("slurmctld", "slurmctld", "-D", "-i")
        self.until(lambda: "is UP" in self.run("scontrol", "ping", check=False), "slurmctld answers")

    def kill_controller(self) -> None:
        self._end("slurmctld")

    def run(self, *command: str, check: bool = True) -> str:
        told = subprocess.run(command, env=os.environ | self.environ, capture_output=True, text=True, timeout=60)
        assert told.returncode == 0 or not check, f"{command}: {told.stderr}"
        return told.stdout

    def job(self, id: str) -> dict[str, Any] | None:
        """As squeue has it; None when it is no more."""
        jobs = json.loads(self.run("squeue", "--json"))["jobs"]
        return next((job for job in jobs if str(job["job_id"]) == id), None)

    def logs(self) -> str:
        parts = [f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.directory.glob("*.log"))]
        return "\n".join(parts)

    def until(self, met: Callable[[], object], what: str, wait_s: float = _LISTEN_S) -> None:
        until_s = time.monotonic() + wait_s
        while not met():
            for name, process in self._processes.items():
                assert process.poll() is None, f"{name} ended\n{self.logs()}"
            assert time.monotonic() < until_s, f"not within {wait_s:g} s: {what}\n{self.logs()}"
            time.sleep(0.05)

    def stop(self) -> None:
        """Jobs first: what slurmd started outlives it."""
        if self._running("slurmctld"):
            self.run("scancel", "--full", "--signal=KILL", "--user=root", check=False)
            self.run("scancel", "--user=root", check=False)
            deadline_s = time.monotonic() + 15
            while self.run("squeue", "-h", check=False).strip() and time.monotonic() < deadline_s:
                time.sleep(0.1)
        for name in reversed(list(self._processes)):
            self._end(name)

    def _start_munge(self) -> None:
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._spawn(
            "munged", "munged", "--foreground", "--force", f"--socket={self._munge}", f"--key-file={key}",
            f"--pid-file={self.directory / 'munged.pid'}", f"--log-file={self.directory / 'munged.log'}",
            f"--seed-file={self.directory / 'munged.seed'}",
        )  # fmt: skip
        self.until(self._munge.exists, "munged listens")

    def _spawn(self, name: str, *command: str) -> None:
        with (self.directory / f"{name}.out.log").open("ab") as out:
            self._processes[name] = subprocess.Popen(
                command, env=os.environ | self.environ, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def _running(self, name: str) -> bool:
        return name in self._processes and self._processes[name].poll() is None

    def _end(self, name: str) -> None:
        process = self._processes.pop(name)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def running_slurm(directory: Path) -> Iterator[Slurm]:
    slurm = Slurm(directory)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


def _path() -> str:
    """Daemons are in sbin, which is not on everybody's PATH."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [found.getsockname()[1] for found in sockets]
    for found in sockets:
        found.close()
    return ports


if __name__ == "__main__":  # for scripts: what to export, and a cluster until stdin ends
    with TemporaryDirectory(prefix="slurm-") as own, running_slurm(Path(own)) as cluster:
        print("\n".join(f"export {name}={value}" for name, value in cluster.environ.items()), flush=True)
        sys.stdin.read()

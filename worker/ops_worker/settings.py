"""The worker's settings: `OPS_*` variables, read once at start and passed on."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, DirectoryPath, Field, SecretStr, ValidationError, model_validator

from ops_contract import variables


class SettingsError(Exception):
    """A setting is missing or wrong; the message names the variable."""


class Settings(BaseModel):
    """Lease, grace and intervals are the backend's: registration returns them."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    api_url: str = Field(pattern=r"^https?://[^/\s]+", description="address of the API, like http://127.0.0.1:8470")
    api_token: SecretStr = Field(min_length=1, description="a token of scope `worker`, to register with")
    storage_root: DirectoryPath = Field(
        description="where checkpoints are published; the same for all workers; must exist"
    )
    worker_name: str = Field(
        default_factory=socket.gethostname,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="letters, digits, dot, dash, underscore",
    )
    worker_bind: str = Field("127.0.0.1", description="address to listen on")
    worker_port: int = Field(0, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    worker_url: str | None = Field(
        None, pattern=r"^https?://[^/\s]+\S*$", max_length=200, description="where the API reaches this worker"
    )
    cpu_slots: int = Field(
        1, ge=1, le=256, description="how many trainings at a time on the CPU, beside one on each GPU"
    )
    cpu_cores: int = Field(
        default_factory=lambda: len(os.sched_getaffinity(0)),
        ge=1,
        description="cores, divided among the slots, those of GPUs too",
    )
    gpus: str | None = Field(
        None,
        pattern=r"^(all|none|[A-Za-z0-9-]+( *, *[A-Za-z0-9-]+)*)$",
        description="which GPUs are slots, of those that `CUDA_VISIBLE_DEVICES` shows: `all`, `none` (none is looked "
        "at, and none hidden from its trainings), or numbers as in `nvidia-smi` or uuids, with commas",
    )
    gpu_share: str = Field(
        "1/1",
        pattern=r"^[1-9][0-9]*/[1-9][0-9]*$",
        description="k/n: the k-th of n workers that divide these GPUs; `ops up` sets it",
    )
    energy_interval_s: float = Field(0.1, ge=0.01, le=1, description="between two readings of the meters, 0.01 to 1")
    cpu_power_w: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="watts of one busy core: where no meter of the CPU is readable, its slots are charged with it, "
        "marked `estimated`",
    )
    user_code: bool = Field(
        False,
        description="whether it runs commands, workloads that its users bring, and jobs that set variables; "
        "1 under `ops up`",
    )
    secrets_dir: DirectoryPath | None = Field(
        None, description="files with the values of secrets, by their names; those in OPS_SECRET_<name> come first"
    )
    worker_python: str | None = Field(
        None,
        description="the Python in which trainers run: it has its own torch, and Relight's base install; "
        "`--python PATH` too",
    )
    worker_idle_exit_s: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="seconds without any work after which the worker ends as on SIGTERM, for allocations of a batch "
        "system that cost while they idle",
    )
    worker_state_dir: Path = Field(
        description="where the outbox, the trainers' output, attempts' directories and the last snapshots are kept"
    )

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.worker_bind in ("", "0.0.0.0", "::") and self.worker_url is None:
            raise ValueError("OPS_WORKER_URL: needed when OPS_WORKER_BIND is every address: the API cannot guess one")
        share, of = self.gpu_share_of
        if share > of:
            raise ValueError(f"OPS_GPU_SHARE: {share} of {of} is none; k/n has k from 1 to n")
        return self

    def cores_per_slot(self, gpus: int = 0) -> int:
        """The same for every slot: a resumed training finds as many threads as it had."""
        return max(1, self.cpu_cores // (self.cpu_slots + gpus))

    @property
    def gpu_share_of(self) -> tuple[int, int]:
        share, _, of = self.gpu_share.partition("/")
        return int(share), int(of)

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Self:
        """Raises SettingsError naming every variable that is missing or wrong."""
        given = variables.given(cls, environ)
        name = given.get("worker_name", socket.gethostname())
        given.setdefault("worker_state_dir", str(_state_home(environ) / "relight" / "workers" / name))
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise SettingsError(variables.problems(error, cls)) from None


def _state_home(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("XDG_STATE_HOME") or Path(environ.get("HOME") or Path.home()) / ".local" / "state")

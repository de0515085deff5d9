"""The backend's settings: `OPS_*` variables, read once at start and passed on."""

import os
import shlex
from collections.abc import Mapping
from typing import Self

from pydantic import (
    BaseModel,
    DirectoryPath,
    Field,
    FilePath,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from ops_backend.addresses import allowed
from ops_backend.database import Limits
from ops_contract import variables


class SettingsError(Exception):
    """A setting is missing or wrong; the message names the variable."""


def with_our_driver(url: str) -> str:
    """As people write it (`postgresql://`, `postgres://`), with the driver that we have. Raises ValueError."""
    scheme, separator, rest = url.partition("://")
    if scheme not in ("postgres", "postgresql", "postgresql+asyncpg") or not separator:
        raise ValueError("not the address of a Postgres database")
    url = f"postgresql+asyncpg://{rest}"
    try:
        make_url(url)
    except (ValueError, ArgumentError):  # whose words have parts of it, the password's among them
        raise ValueError("not the address of a Postgres database; special characters are written like %2F") from None
    return url


class Settings(BaseModel):
    """Lease, grace and intervals are the backend's; workers learn them when they register."""

    database_url: str = Field(description="postgresql://user:password@host/database, Postgres 15 or newer")
    api_token: str = Field(
        min_length=16,
        description="the first admin's bearer token, at least 16 characters; `ops tokens create` makes others",
    )
    storage_root: DirectoryPath = Field(
        description="where the workers publish checkpoints; must exist; old ones are deleted there, and logs written"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8470, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    tls_cert: FilePath | None = Field(
        None, description="with OPS_TLS_KEY: a chain of certificates (PEM), for https without a proxy; restart to renew"
    )
    tls_key: FilePath | None = Field(None, validate_default=True, description="the private key of OPS_TLS_CERT (PEM)")
    lease_s: float = Field(15.0, gt=0, description="a worker silent for this long has lost its operations")
    cancel_grace_s: float = Field(30.0, gt=0, description="from asking a trainer to stop to killing it")
    poll_s: float = Field(
        0.5, gt=0, description="how often the dispatcher looks for work unprompted, and streams for what is new"
    )
    retry_backoff_s: float = Field(2.0, ge=0, description="before the first retry; doubles up to five minutes")
    orphan_sweep_s: float = Field(
        600.0,
        gt=0,
        description="how often directories that a crash left are looked for, a thousand operations at a time, and "
        "snapshots that nothing refers to",
    )
    max_streams: int = Field(
        200, ge=1, description="how many clients may watch by `GET …/stream` at a time, of each API; one more is a 503"
    )
    worker_allow: str = Field(
        "",
        description="where workers may be called beside the address that they register from: names, addresses and "
        "networks (`10.1.0.0/16`), with commas",
    )
    audit_days: float = Field(400.0, gt=0, le=36_500, description="how long the audit keeps who did what")
    carbon_g_per_kwh: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="grams of CO2 that a kilowatt-hour causes; else carbon is null"
    )
    price_per_kwh: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="what a kilowatt-hour costs; else the cost is null"
    )
    currency: str | None = Field(None, min_length=1, max_length=8, description="of the price, such as EUR")
    api_url: str | None = Field(
        None,
        pattern=r"^https?://[^/\s]+$",
        description="where workers that Slurm starts reach the API, as seen from a node",
    )
    slurm_max_jobs: int = Field(
        0, ge=0, le=1000, description="how many jobs of Slurm may be open at a time; 0: none is ever asked for"
    )
    slurm_after_s: float = Field(
        10.0, ge=0, description="an operation that has been due for so long, with no free slot for it, asks for a job"
    )
    slurm_token_file: FilePath | None = Field(
        None, description="a file with a token of scope `worker`, on every node, readable by the backend's user alone"
    )
    slurm_setup: FilePath | None = Field(
        None, description="a script, on every node, that is sourced before `ops worker`, and makes it one that runs"
    )
    slurm_partition: str = Field("", description="where jobs are submitted to; else Slurm's default")
    slurm_time_limit: str = Field("", description="of a job, as `sbatch --time` has it; else the partition's")
    slurm_memory: str = Field(
        "", description="of a node's worker, as `sbatch --mem` has it; else the cluster's default"
    )
    slurm_cores: int = Field(
        4, ge=1, le=4096, description="of each slot, where an operation does not say `resources.cores`"
    )
    slurm_gpus_per_node: int = Field(0, ge=0, le=64, description="how many GPUs a node of the partition has; 0: none")
    slurm_args: str = Field("", description="more arguments of sbatch, such as `--account=vision --qos=long`")
    slurm_log_dir: DirectoryPath | None = Field(
        None, description="where the output of jobs goes, `JOBNAME.log`; a directory of every node; else it is lost"
    )
    slurm_idle_exit_s: float = Field(120.0, gt=0, description="a worker of Slurm's that had no work for so long ends")
    slurm_pending_warn_s: float = Field(
        600.0, gt=0, description="an operation whose job has been pending for so long has a note of why"
    )
    db_pool_size: int = Field(
        10,
        ge=1,
        description="connections to the database for requests; twelve more are its own: heartbeats, loops and "
        "`/metrics` wait for no request",
    )

    @field_validator("database_url")
    @classmethod
    def _with_our_driver(cls, url: str) -> str:
        return with_our_driver(url)

    @field_validator("worker_allow")
    @classmethod
    def _allow_list(cls, text: str) -> str:
        allowed(text)
        return text

    @field_validator("tls_key")
    @classmethod
    def _both_or_neither(cls, key: FilePath | None, info: ValidationInfo) -> FilePath | None:
        if (key is None) != (info.data.get("tls_cert") is None):
            raise ValueError("OPS_TLS_CERT and OPS_TLS_KEY go together")
        return key

    @model_validator(mode="after")
    def _workers_of_slurm_can_come(self) -> Self:
        if self.slurm_max_jobs == 0:
            return self
        if self.api_url is None or self.slurm_token_file is None:
            raise ValueError("OPS_SLURM_MAX_JOBS needs OPS_API_URL and OPS_SLURM_TOKEN_FILE: workers register by them")
        if self.slurm_token_file.stat().st_mode & 0o077:
            raise ValueError(f"OPS_SLURM_TOKEN_FILE: others may read it; chmod 600 {self.slurm_token_file}")
        try:
            shlex.split(self.slurm_args)
        except ValueError as error:
            raise ValueError(f"OPS_SLURM_ARGS: {error}") from None
        return self

    @property
    def heartbeat_s(self) -> float:
        """Three chances within a lease, so that one lost beat costs nothing."""
        return self.lease_s / 3

    @property
    def slot_rest_s(self) -> float:
        """A slot that refused is left alone until its worker has been heard again."""
        return self.heartbeat_s

    @property
    def tick_s(self) -> float:
        return min(1.0, self.lease_s / 5)

    @property
    def db_limits(self) -> Limits:
        """A transaction that hangs on a hold leaves its worker time for another beat within the lease."""
        return Limits(wait_s=self.lease_s / 4, transaction_s=self.lease_s / 2)

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Self:
        """Raises SettingsError naming every variable that is missing or wrong."""
        try:
            return cls.model_validate(variables.given(cls, env))
        except ValidationError as error:
            raise SettingsError(variables.problems(error, cls)) from None

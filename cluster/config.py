"""The ``cluster:`` block of a job: which Ray to use, what a worker needs, how many evaluations run beside."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

EVALUATION_RESOURCE = "evaluation"
#: Of nodes that take workers of a fine-tuning beside those of the training.
FINE_TUNING_RESOURCE = "fine-tuning"


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WorkerResources(_Block):
    """What one training worker occupies, in Ray's logical units; and with how many ``threads`` it computes.

    ``threads``: None: the cores of its machine, shared among the training workers there.
    """

    cpus: float = Field(default=1, ge=0)
    gpus: float = Field(default=0, ge=0)
    resources: dict[str, Annotated[float, Field(gt=0)]] = {}
    threads: int | None = Field(default=None, ge=1)

    def bundle(self) -> dict[str, float]:
        """The same as one of Ray's resource bundles, without zeros."""
        amounts = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        return {name: float(amount) for name, amount in amounts.items() if amount > 0}


class Environment(_Block):
    """What a submitted job needs on the cluster's machines besides the code.

    ``env_vars`` stay out of logs and messages here, but Ray keeps them readable for whoever can reach its
    dashboard: prefer credentials that the machines have by themselves.
    """

    pip: list[str] = []
    env_vars: dict[str, SecretStr] = {}

    def runtime_env(self) -> dict[str, object]:
        """Ray's ``runtime_env`` (the values of ``env_vars`` in clear: not for printing)."""
        environment: dict[str, object] = {}
        if self.pip:
            environment["pip"] = list(self.pip)
        if self.env_vars:
            environment["env_vars"] = {
                name: value.get_secret_value() for name, value in self.env_vars.items()
            }
        return environment


class ClusterConfig(_Block):
    """The ``cluster:`` block.

    ``address``: None starts a Ray of its own on this machine, reachable from this machine only; ``auto`` or
    ``host:port`` joins a running one, from one of its machines (from elsewhere: ``cluster.jobs``).
    ``RAY_ADDRESS``, which Ray sets within a submitted job, stands in for None. ``num_cpus``,
    ``object_store_mb`` and ``dashboard_port`` concern a Ray of its own only. ``fine_tuning``: what one worker of
    a task's fine-tuning occupies; None: see ``cluster.resources.for_fine_tuning``.
    """

    address: str | None = None
    num_cpus: int | None = Field(default=None, ge=1)
    object_store_mb: int = Field(default=512, ge=80)  # Ray refuses less than 75 MiB
    dashboard_port: int | None = Field(default=None, ge=1, le=65535)  # None: no dashboard
    evaluations: int = Field(default=1, ge=1)
    environment: Environment = Environment()
    worker: WorkerResources = WorkerResources()
    fine_tuning: WorkerResources | None = None
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "SPREAD"
    wait_for_resources_s: float = Field(default=0, ge=0)  # for a cluster that grows on demand
    grow_check_s: float = Field(
        default=60, gt=0
    )  # how often a group that lost workers looks whether there is room
    show_worker_output: bool = False  # copy what workers print to this terminal

    @field_validator("address")
    @classmethod
    def _known_form(cls, address: str | None) -> str | None:
        if address is None or address == "auto":
            return address
        if address.startswith("ray://"):
            raise ValueError(
                "Ray Train does not run through Ray's client; submit the job to http://host:8265"
            )
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or "/" in host:
            raise ValueError('expected "auto", "host:port" or nothing (a Ray of its own)')
        return address

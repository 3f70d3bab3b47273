"""Does a cluster hold the training workers and the evaluations? Asked first: Ray waits for ever."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

from cluster.config import EVALUATION_RESOURCE, FINE_TUNING_RESOURCE, ClusterConfig, WorkerResources
from cluster.errors import ClusterError

_POLL_S = 1.0


def places(nodes: Sequence[Mapping[str, float]], bundle: Mapping[str, float]) -> int:
    """How many copies of ``bundle`` fit on ``nodes``, each copy whole on one node."""
    if not bundle:
        return 10**9
    return sum(
        min(math.floor(node.get(name, 0.0) / amount + 1e-9) for name, amount in bundle.items())
        for node in nodes
    )


def shortage(nodes: Sequence[Mapping[str, float]], config: ClusterConfig, workers: int) -> str | None:
    """One line that says what ``nodes`` lack for the job, or None."""
    bundle = config.worker.bundle()
    fitting = places(nodes, bundle)
    wanted = f"{workers} workers of {_listed(bundle)} each"
    beside = {FINE_TUNING_RESOURCE} - set(bundle)  # there is no end of these on a Ray of our own
    shown = [{name: amount for name, amount in node.items() if name not in beside} for node in nodes]
    there = "; ".join(map(_listed, shown)) or "no nodes"
    if fitting < workers:
        return f"the cluster has room for {fitting} of {wanted}; its nodes: {there}"
    alone = sum(1 for node in nodes if places([node], bundle))
    if config.placement == "STRICT_SPREAD" and alone < workers:
        return f"placement STRICT_SPREAD needs {workers} nodes, {alone} can hold a worker; the nodes: {there}"
    if config.placement == "STRICT_PACK" and all(places([node], bundle) < workers for node in nodes):
        return f"placement STRICT_PACK: no single node holds {wanted}; the nodes: {there}"
    slots = sum(node.get(EVALUATION_RESOURCE, 0.0) for node in nodes)
    if slots < config.evaluations:
        return (
            f'the cluster has {slots:g} "{EVALUATION_RESOURCE}" slots, '
            f"cluster.evaluations wants {config.evaluations}; "
            f"""start its nodes with: ray start --resources='{{"{EVALUATION_RESOURCE}": 1}}'"""
        )
    return None


def check_resources(config: ClusterConfig, workers: int) -> None:
    """Compares the connected cluster (its totals: what others use now will be free again) with the job.

    Raises:
        ClusterError: what is there and what is wanted, after ``config.wait_for_resources_s``.
    """
    import ray

    deadline = time.monotonic() + config.wait_for_resources_s
    while lacking := shortage([n["Resources"] for n in ray.nodes() if n["Alive"]], config, workers):
        if time.monotonic() >= deadline:
            waited = config.wait_for_resources_s
            raise ClusterError(lacking + (f" (waited {waited:g} s)" if waited else ""))
        time.sleep(_POLL_S)


def for_fine_tuning(config: ClusterConfig, offered: Mapping[str, float]) -> ClusterConfig:
    """The configuration for the workers of a task's fine-tuning, on a cluster that has the resources ``offered``.

    Where the block says what such a worker occupies, that. Else, where nodes offer ``fine-tuning`` (a Ray of our
    own always does), one of it and no CPUs, which all belong to the training: so both can run at once. Else what a
    training worker occupies, so that a fine-tuning waits for the training's end. GPUs are as the training's.
    """
    worker = config.fine_tuning
    if worker is None and offered.get(FINE_TUNING_RESOURCE, 0.0) > 0:
        worker = WorkerResources(cpus=0, gpus=config.worker.gpus, resources={FINE_TUNING_RESOURCE: 1})
    return config.model_copy(update={"worker": worker or config.worker})


def _listed(resources: Mapping[str, float]) -> str:
    """``2 CPU, 1 GPU``; without the names that Ray gives to nodes and the sizes of memories."""
    shown = {
        name: amount
        for name, amount in sorted(resources.items())
        if ":" not in name and name not in ("memory", "object_store_memory")
    }
    return ", ".join(f"{amount:g} {name}" for name, amount in shown.items()) or "nothing"

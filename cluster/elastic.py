"""How many workers a group has that may be smaller than it wants to be.

::

    nodes       4 workers fit   ......   2 fit   ......   3 fit   .....................   4 fit
    sizes 2, 4  4 workers       death -> 2       ......   2 (3 is none of the sizes)      leave, start anew -> 4

A group shrinks when workers die and not all fit any more. It grows when a larger size fits: the workers are told to
leave (``cluster.notice``), so that what they have done is not lost, and the group starts anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ScalingDecision,
)

from cluster.notice import Reason, current_notice
from cluster.resources import places


class AdmissibleSizes(ElasticScalingPolicy):
    """In Ray's controller: the largest of ``sizes`` that the living nodes have room for.

    Ray's own takes any number between the least and the most, looks at reservations that outlive their nodes for a
    while, and stops a running group at once to resize it.
    """

    def __init__(self, scaling_config: ScalingConfig, sizes: Sequence[int]) -> None:
        super().__init__(scaling_config)
        self._sizes = sorted(sizes)
        self._told = float("-inf")  # start of the group that was told to leave

    def _get_reserved_resources(self) -> Any:
        import ray

        return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        fitting = places(
            list(reserved_resources.values()), self.scaling_config._resources_per_worker_not_none
        )
        return max((size for size in self._sizes if size <= fitting), default=0)

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        wanted = getattr(decision, "num_workers", 0)
        if wanted > worker_group_state.num_workers and self._told != worker_group_state.start_time:
            self._told = worker_group_state.start_time
            worker_group_state.workers[0].execute_async(_tell_to_leave)
        return NoopDecision()


def _tell_to_leave() -> None:
    current_notice().tell(Reason.MACHINE)

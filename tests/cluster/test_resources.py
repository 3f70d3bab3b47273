"""What fits on which nodes, without a cluster."""

import pytest
from pydantic import ValidationError

from cluster.config import ClusterConfig, WorkerResources
from cluster.resources import for_fine_tuning, places, shortage

NODE = {"CPU": 4.0, "GPU": 1.0, "evaluation": 1.0, "memory": 1e9, "node:10.0.0.1": 1.0}


def test_a_worker_never_straddles_two_nodes() -> None:
    assert places([{"CPU": 3.0}, {"CPU": 3.0}], {"CPU": 2.0}) == 2
    assert places([{"CPU": 3.0}, {"CPU": 3.0}], {"CPU": 4.0}) == 0


def test_fractions_add_up() -> None:
    assert places([{"GPU": 1.0}], {"GPU": 0.1}) == 10


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"worker": {"gpus": 1}}, "room for 2 of 3 workers of 1 CPU, 1 GPU each; its nodes: 4 CPU, 1 GPU"),
        ({"worker": {"resources": {"fast": 1}}}, "room for 0 of 3 workers of 1 CPU, 1 fast each"),
        ({"placement": "STRICT_SPREAD"}, "STRICT_SPREAD needs 3 nodes, 2 can hold a worker"),
        ({"placement": "STRICT_PACK", "worker": {"cpus": 2}}, "no single node holds 3 workers of 2 CPU each"),
        ({"evaluations": 3}, 'has 2 "evaluation" slots, cluster.evaluations wants 3; start its nodes with'),
    ],
)
def test_a_shortage_says_what_is_there_and_what_is_wanted(config: dict, told: str) -> None:
    line = shortage([NODE, NODE], ClusterConfig.model_validate(config), workers=3)
    assert line is not None
    assert told in line
    assert "\n" not in line
    assert "memory" not in line
    assert "10.0.0.1" not in line


def test_a_fine_tuning_takes_no_cpus_where_nodes_offer_places_for_it() -> None:
    config = ClusterConfig.model_validate({"worker": {"cpus": 2, "gpus": 1}})

    def bundle(config: ClusterConfig, offered: dict[str, float]) -> dict[str, float]:
        return for_fine_tuning(config, offered).worker.bundle()

    assert bundle(config, NODE | {"fine-tuning": 8.0}) == {"GPU": 1.0, "fine-tuning": 1.0}
    assert bundle(config, NODE) == {"CPU": 2.0, "GPU": 1.0}  # as the training, after whose end there is room
    said = config.model_copy(update={"fine_tuning": WorkerResources(cpus=0.5)})
    assert bundle(said, NODE | {"fine-tuning": 8.0}) == {"CPU": 0.5}


def test_no_shortage_where_all_fits() -> None:
    config = ClusterConfig.model_validate({"evaluations": 2, "worker": {"cpus": 2, "gpus": 0.5}})
    assert shortage([NODE, NODE], config, workers=4) is None


@pytest.mark.parametrize(
    "address", ["somewhere", "http://head:8265", "head:port", ":6379", "ray://head:10001"]
)
def test_an_address_of_no_known_form_is_refused(address: str) -> None:
    with pytest.raises(ValidationError, match=r'expected "auto", "host:port"|does not run through'):
        ClusterConfig(address=address)


def test_values_of_the_environment_are_not_shown() -> None:
    config = ClusterConfig.model_validate({"environment": {"env_vars": {"AWS_SECRET_ACCESS_KEY": "hush"}}})
    assert "hush" not in repr(config) + str(config) + config.model_dump_json()
    assert config.environment.runtime_env() == {"env_vars": {"AWS_SECRET_ACCESS_KEY": "hush"}}

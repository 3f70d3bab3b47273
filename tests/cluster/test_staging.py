"""What a submitted job's folder holds, and what its first program says."""

import json
import sys
from pathlib import Path

import pytest

from cluster import jobs
from cluster.errors import ClusterError
from cluster.import_path import PACKAGES
from cluster.job_start import SUBMISSION, fault


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    path = tmp_path / "my-job.yaml"
    path.write_text("job: {name: x}\n")
    return path


def test_the_folder_holds_the_packages_and_the_yaml_without_caches(yaml: Path, tmp_path: Path) -> None:
    folder = tmp_path / "staged"
    folder.mkdir()
    jobs.stage(yaml.read_bytes(), folder)
    beside = (jobs.STAGED_YAML, "glscl_pipeline.py", SUBMISSION)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*PACKAGES, *beside])
    assert (folder / "job.yaml").read_text() == yaml.read_text()
    assert (folder / "cluster/workers.py").read_bytes() == Path(jobs.__file__).with_name(
        "workers.py"
    ).read_bytes()
    assert not [path for path in folder.rglob("*") if path.name == "__pycache__" or path.suffix == ".pyc"]


def test_the_demo_s_corpus_stays_behind_and_little_is_sent(yaml: Path, tmp_path: Path) -> None:
    folder = tmp_path / "staged"
    folder.mkdir()
    jobs.stage(yaml.read_bytes(), folder)
    assert (Path(jobs.__file__).parents[1] / "pipeline/demo/corpus").is_dir()
    assert not (folder / "pipeline/demo/corpus").exists()
    assert (folder / "pipeline/demo/demo.yaml").exists()
    assert (folder / "model/vocabulary").is_dir()
    assert jobs._size(folder) < 8 * 2**20


def test_data_among_the_packages_are_refused_beyond_the_limit(
    yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "sent_along"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "data" / "blob").write_bytes(b"x" * 500_000)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(jobs, "_LARGEST_PACKAGE", 400_000)
    (tmp_path / "a").mkdir()
    with pytest.raises(ClusterError, match=r"the code to send has .* MiB, at most"):
        jobs.stage(yaml.read_bytes(), tmp_path / "a", packages=["sent_along"])


def test_arguments_variables_and_the_users_modules_are_sent_in_files(yaml: Path, tmp_path: Path) -> None:
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers" / "__init__.py").write_text("SHOUT = '!'\n")
    (tmp_path / "my_filters.py").write_text("from helpers import SHOUT\n")
    folder = tmp_path / "staged"
    folder.mkdir()
    modules = [tmp_path / "my_filters.py", tmp_path / "helpers"]
    jobs.stage(
        yaml.read_bytes(),
        folder,
        ["run", "job.yaml", "--set", "a=b"],
        {"NAME": "value"},
        modules,
        ["cluster"],
    )
    assert (folder / "my_filters.py").read_text() == "from helpers import SHOUT\n"
    assert (folder / "helpers" / "__init__.py").exists()
    sent = json.loads((folder / SUBMISSION).read_text())
    assert sent["arguments"] == ["run", "job.yaml", "--set", "a=b"]
    assert sent["variables"] == {"NAME": "value"}
    assert sent["python"] == list(sys.version_info[:2])
    assert sent["modules"].items() >= {"torch": "torch", "yaml": "pyyaml", "PIL": "pillow"}.items()


@pytest.mark.parametrize(
    ("python", "modules", "told"),
    [
        (list(sys.version_info[:2]), {"json": "json"}, None),
        ([3, 99], {}, "and the code is for Python 3.99: start the cluster with Python 3.99"),
        (
            list(sys.version_info[:2]),
            {"no_such_module": "no-such", "json": "json", "another_one": "another"},
            "runs this job and lacks another, no-such: install them there",
        ),
    ],
)
def test_a_python_that_cannot_run_the_job_is_named_in_a_line(
    python: list[int], modules: dict[str, str], told: str | None
) -> None:
    found = fault(python, modules)
    if told is None:
        assert found is None
    else:
        assert found is not None
        assert told in found
        assert sys.executable in found
        assert "\n" not in found


def test_a_package_that_is_not_there_is_named(yaml: Path, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    with pytest.raises(ClusterError, match="package no_such_package is not installed"):
        jobs.stage(yaml.read_bytes(), tmp_path / "c", packages=["no_such_package"])

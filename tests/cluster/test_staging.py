"""What a submitted job's folder holds."""

from pathlib import Path

import pytest

from cluster import jobs
from cluster.errors import ClusterError


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    path = tmp_path / "my-job.yaml"
    path.write_text("job: {name: x}\n")
    return path


def test_the_folder_holds_the_packages_and_the_yaml_without_caches(yaml: Path, tmp_path: Path) -> None:
    folder = tmp_path / "staged"
    folder.mkdir()
    jobs.stage(yaml, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*jobs.PACKAGES, jobs.STAGED_YAML])
    assert (folder / "job.yaml").read_text() == yaml.read_text()
    assert (folder / "cluster/workers.py").read_bytes() == Path(jobs.__file__).with_name(
        "workers.py"
    ).read_bytes()
    assert not [path for path in folder.rglob("*") if path.name == "__pycache__" or path.suffix == ".pyc"]


def test_a_corpus_beyond_the_limit_stays_behind(
    yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "sent_along"
    (package / "corpus").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "corpus" / "data").write_bytes(b"x" * 5000)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(jobs, "_LARGEST_PACKAGE", 4096)
    (tmp_path / "a").mkdir()
    with pytest.raises(ClusterError, match=r"the code to send has .* MiB, at most"):
        jobs.stage(yaml, tmp_path / "a", ["sent_along"])
    monkeypatch.setattr(jobs, "_LEFT_BEHIND", ("sent_along/corpus",))
    (tmp_path / "b").mkdir()
    jobs.stage(yaml, tmp_path / "b", ["sent_along"])
    assert not (tmp_path / "b/sent_along/corpus").exists()
    assert (tmp_path / "b/sent_along/__init__.py").exists()


def test_a_package_that_is_not_there_is_named(yaml: Path, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    with pytest.raises(ClusterError, match="package no_such_package is not installed"):
        jobs.stage(yaml, tmp_path / "c", ["no_such_package"])

"""Fixtures shared by every room's tests; each lives in a file of its own under ``tests/fixtures``."""

pytest_plugins = [
    "tests.fixtures.s3",
    "tests.fixtures.faulty_s3",
    "tests.fixtures.exact_s3",
    "tests.fixtures.ray_cluster",
    "tests.fixtures.corpora",
    "tests.fixtures.jobs",
    "tests.fixtures.web",
    "tests.fixtures.chaos",
    "tests.fixtures.fuzz",
]

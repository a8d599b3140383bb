"""A Slurm for the tests beside this."""

from collections.abc import Iterator

import pytest

import slurm_cluster
from slurm_cluster import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A Slurm of one node with 12 CPUs, whose arrays have two elements at the most."""
    reason = slurm_cluster.why_not()
    if reason is not None:
        pytest.skip(reason)
    with Cluster(cpus=12, max_array_size=2) as started:
        yield started


@pytest.fixture
def slurm(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The same, for this process too."""
    for name, value in cluster.variables.items():
        monkeypatch.setenv(name, value)
    return cluster

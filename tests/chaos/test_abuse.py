"""Clients that mean harm to a gateway: what it holds is bounded and given back, and others get their answers."""

from collections.abc import AsyncIterator

import psutil
import pytest
import pytest_asyncio
from faults.abuse import KINDS, abuse, good_request
from faults.cluster import ChaosCluster, chaos_cluster
from models import model_path

from isthmus.proto.rpc.transport import Transport

pytestmark = pytest.mark.asyncio(loop_scope="module")
SECONDS = {"slow loris": 12.0}  # longer than a handshake may take
GROWTH_MB = 400  # of one kind: large headers took 170 MB in the runs that this was written with, others less


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ChaosCluster]:
    folder = tmp_path_factory.mktemp("abuse")
    async with chaos_cluster(model_path("tiny-llama"), folder, prefill=1, decode=1) as running:
        yield running


@pytest.mark.parametrize("kind", sorted(KINDS))
async def test_abuse_costs_little_and_hurts_nobody(cluster: ChaosCluster, kind: str) -> None:
    gateway, transport = cluster.gateway, Transport()
    assert gateway.process is not None
    process = psutil.Process(gateway.process.pid)
    cost = await abuse(kind, gateway.address, good_request(500), process, SECONDS.get(kind, 5.0), transport)
    assert (cost["ended"], cost["wrong"], cost["errors"], gateway.starts) == (0, 0, [], 1), cost
    assert cost["good"] > 0
    rss, descriptors = cost["rss_mb"], cost["descriptors"]
    assert rss["peak"] - rss["before"] < GROWTH_MB, cost
    assert descriptors["after"] <= descriptors["before"], cost
    assert await cluster.leaked_pages() == 0

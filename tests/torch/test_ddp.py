"""DataParallel beside DistributedDataParallel over gloo, on the same ranks: gradients, and a whole script."""

from __future__ import annotations

import copy
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
nn = torch.nn

from mpiml.examples import ddp_loop  # noqa: E402
from mpiml.torch import DataParallel, keywords, rank, size  # noqa: E402
from tests.torch.modules import (  # noqa: E402
    WORLD,
    Twice,
    accumulated,
    close,
    gradients,
    not_synchronised,
    several_forwards,
)
from tests.torch.scripts import ROOT, difference, kept, replaced  # noqa: E402

pytestmark = pytest.mark.mpi

DIGEST = '        print("weights_sha256", hashlib.sha256(weights).hexdigest())\n'
BEFORE = {
    "import mpiml.torch\n": "",
    "    rank, size = mpiml.torch.rank(), mpiml.torch.size()\n": (
        '    torch.distributed.init_process_group("gloo")\n'
        "    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()\n"
    ),
    "DistributedSampler(data, num_replicas=size, rank=rank)": "DistributedSampler(data)",
    "mpiml.torch.DataParallel(net)": "nn.parallel.DistributedDataParallel(net)",
    DIGEST: f"{DIGEST}    torch.distributed.destroy_process_group()\n",
}


@pytest.fixture(autouse=True)
def torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun tells its processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = WORLD.bcast(probe.getsockname()[1])
    place = {"RANK": rank(), "WORLD_SIZE": size(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in (place | {"GLOO_SOCKET_IFNAME": "lo"}).items():
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def gloo() -> Iterator[None]:
    torch.distributed.init_process_group("gloo")
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("act", [accumulated, not_synchronised, several_forwards])
def test_gradients_are_those_of_ddp(act: Callable[[Any], None]) -> None:
    torch.manual_seed(0)
    module = Twice()
    theirs = nn.parallel.DistributedDataParallel(copy.deepcopy(module))
    net = DataParallel(module)
    for each in (net, theirs):
        act(each)
    close(gradients(net), gradients(theirs))


@pytest.mark.usefixtures("gloo")
@pytest.mark.skipif("forward_sync_buffers" not in keywords.of_torch(), reason="new in PyTorch 2.13")
def test_buffers_start_as_those_of_ddp() -> None:
    """Whether they are to be averaged or not."""
    for averaged in (True, False):
        module = nn.BatchNorm1d(5)
        module.running_mean += rank()
        net = DataParallel(copy.deepcopy(module), forward_sync_buffers=averaged)
        theirs = nn.parallel.DistributedDataParallel(module, forward_sync_buffers=averaged)
        pairs = zip(net.buffers(), theirs.buffers(), strict=True)
        assert all(WORLD.allgather(all(torch.equal(*pair) for pair in pairs)))


def test_a_script_has_the_same_losses(capsys: pytest.CaptureFixture[str]) -> None:
    """The script of which the page shows all that changes, before and after."""
    after = Path(ddp_loop.__file__).read_text()
    before = replaced(after, BEFORE)
    assert difference(before, after) in (ROOT / "README.md").read_text()
    script: dict[str, Any] = {"__name__": "before"}
    exec(kept(before), script)
    script["main"](epochs=1)
    ddp_loop.main(epochs=1)
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall("loss (.*)", printed)]
    assert len(losses) == 2 * (rank() == 0)
    assert losses[1:] == pytest.approx(losses[:1], rel=1e-4)
    assert all(loss < 1.5 for loss in losses)
    assert len(re.findall(r"weights_sha256 [0-9a-f]{64}\n", printed)) == len(losses)
    assert len(after.splitlines()) < 40

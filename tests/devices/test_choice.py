"""Which device a rank takes, and in what words ranks are refused that cannot all compute on one."""

# ruff: noqa: E402 - PyTorch first

from __future__ import annotations

import sys

import pytest

from mpiml.devices import choice
from mpiml.devices.choice import Candidate
from mpiml.errors import ConfigError

torch = pytest.importorskip("torch")

from mpiml.devices.fake import DEVICES, Fake


def everyone(monkeypatch: pytest.MonkeyPatch, *nodes: str | tuple[str, int]) -> list[Candidate]:
    """Candidates of all ranks, where each node has these devices, one rank each or so many ranks."""
    counted = [(node, len(node.split(","))) if isinstance(node, str) else node for node in nodes]
    homes = [number for number, (_, ranks) in enumerate(counted) for _ in range(ranks)]
    found = []
    for rank, home in enumerate(homes):
        monkeypatch.setenv(DEVICES, counted[home][0])
        found.append(choice.candidate("fake", homes, rank)._replace(host=f"host{home}"))
    return found


def refusal(candidates: list[Candidate], share: bool = False) -> str:
    with pytest.raises(ConfigError) as refused:
        choice.check("fake", candidates, share)
    return str(refused.value)


def test_a_rank_takes_its_number_of_the_devices_that_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = everyone(monkeypatch, "a,a", "a,a")
    choice.check("fake", ranks, share=False)
    assert [one.number for one in ranks] == [0, 1, 0, 1]
    assert list(choice.sharers(ranks).values()) == [[0], [1], [2], [3]]
    shared = everyone(monkeypatch, ("a,a", 5), ("a", 2))
    choice.check("fake", shared, share=True)
    assert [one.number for one in shared] == [0, 1, 0, 1, 0, 0, 0]
    assert list(choice.sharers(shared).values()) == [[0, 2, 4], [1, 3], [5, 6]]


def test_some_ranks_may_have_a_device_to_themselves_where_others_share(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = everyone(monkeypatch, ("a,a", 3))
    opened = [choice.opened("fake", ranks, rank, tf32=False) for rank in range(3)]
    assert [type(one) for one in opened] == [Fake] * 3
    assert [(one.number, one.alone) for one in opened] == [(0, False), (1, True), (0, False)]


def test_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(everyone(monkeypatch, ("", 2))) == f"--device fake: {DEVICES} is empty, so there are none"


def test_devices_on_some_ranks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(everyone(monkeypatch, "a,a", ("", 1))) == (
        f"--device fake: {DEVICES} is empty, so there are none (rank 2 on host1; 2 ranks have one)"
    )
    assert refusal(everyone(monkeypatch, ("", 2), "a,a"), share=True).endswith("(rank 0 on host0; 2 ranks have one)")


def test_devices_of_several_types(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(everyone(monkeypatch, "b,b", "b,a", "b"), share=True) == (
        "--device fake: ranks have devices of several types, which compute other bits: a (rank 3), b (rank 0)"
    )


def test_a_device_of_another_type_that_nobody_takes_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    choice.check("fake", everyone(monkeypatch, ("a,b", 1)), share=False)


@pytest.mark.parametrize(
    ("nodes", "numbers"),
    [
        ([("a", 2)], "2 ranks for 1 device, so ranks 0 and 1 would use the same; start 1"),
        ([("a,a", 3)], "3 ranks for 2 devices, so ranks 0 and 2 would use the same; start 2"),
        (["a,a", ("a,a", 4)], "6 ranks for 4 devices, so ranks 2 and 4 would use the same; start 4"),
    ],
)
def test_more_ranks_than_devices(
    monkeypatch: pytest.MonkeyPatch, nodes: list[str | tuple[str, int]], numbers: str
) -> None:
    ranks = everyone(monkeypatch, *nodes)
    assert refusal(ranks) == f"--device fake: {numbers}, or give --share-devices"
    choice.check("fake", ranks, share=True)


@pytest.mark.parametrize("kind", ["cuda", "fake"])
def test_without_pytorch(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    one = choice.candidate(kind, [0], 0)
    assert one.problem.startswith(f"--device {kind}: needs PyTorch, which cannot be imported here: ")


def test_the_host() -> None:
    assert [kind for kind in choice.KINDS if choice.is_host(kind)] == ["auto", "cpu"]

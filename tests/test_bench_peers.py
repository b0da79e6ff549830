"""Peers on one field: twins train as described, promises are watched, and who cannot be had is reported."""

from __future__ import annotations

import hashlib
import json
import zipfile
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apportion.callbacks import LIFT, LISA, SaRA
from apportion.recipes.bench import packages as peers
from apportion.recipes.bench import peers as bench_peers
from apportion.recipes.bench import peers_entries, peers_layers
from apportion.recipes.bench.entry_bars import LR, Size, trainable
from apportion.recipes.bench.field import Contender, Loop, Ours, Rival, layers_of, matrices, plain, training, whole
from apportion.recipes.bench.peers import Plan, compared, main, section
from apportion.recipes.bench.twins import IstTwin, LiftTwin, SaraTwin

TINY = Size("tiny", hidden=64, inner=72, layers=4, tokens=8, vocabulary=40)
EVERYBODY = {c.name: c for c in [*peers_entries.contenders(), *peers_layers.contenders()]}


def trained(rival: Rival, steps: int) -> list[Tensor]:
    rival.run(list(islice(TINY.batches(), steps)), lambda found: None)
    return [p.detach() for p in rival.model.parameters()]


def close(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-4, atol=0.02 * LR) for a, b in zip(one, other, strict=True))


def test_the_twin_of_lisa_trains_the_layers_of_ours_with_moments_kept() -> None:
    kept = trained(Ours(whole(TINY), LISA(2, peers_layers.INTERVAL, state="keep"), 7), 7)
    dropped = trained(Ours(whole(TINY), LISA(2, peers_layers.INTERVAL), 7), 7)
    twin = trained(peers_layers.lisa_twin(whole(TINY), 7), 7)
    assert close(twin, kept)
    assert not close(twin, dropped)


def test_the_twin_of_lift_is_our_lift_without_decay() -> None:
    def ours() -> Rival:
        rival = Ours(matrices(TINY), LIFT(4, 4, 3, exact=True), 6)
        for group in rival.optimizer.base.param_groups:
            group["weight_decay"] = 0.0
        return rival

    def twin(interval: int) -> Rival:
        model = matrices(TINY)
        made = LiftTwin(trainable(model), 4, interval, LR)

        def step() -> None:
            made.step()
            made.zero_grad()

        return Loop(model, step, lambda: {}, lambda: [])

    expected = trained(ours(), 6)
    assert close(trained(twin(4), 6), expected)  # it selects anew before its fourth step, as ours after three
    assert not close(trained(twin(100), 6), expected)


def test_the_twin_of_sara_is_our_sara_without_the_penalty() -> None:
    def twin(nuclear: float) -> Rival:
        model = whole(TINY)
        made = SaraTwin(trainable(model), 2e-3, LR, 0.01, nuclear, min_side=8)

        def step() -> None:
            made.step()
            made.zero_grad()

        return Loop(model, step, lambda: {}, lambda: [])

    expected = trained(Ours(whole(TINY), SaRA(2e-3, progressive_step=None, nuclear=0.0), 4), 4)
    assert close(trained(twin(0.0), 4), expected)
    assert close(trained(twin(5e-4), 4), expected)  # its gradient ends where nothing is updated


def test_the_twin_of_ist_learns_which_layers_a_damped_loss_misses() -> None:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))
            self.scaling = {"default": 2.0}

    adapters = [[Adapter()] for _ in range(4)]
    twin = IstTwin(adapters, seed=1)
    seen: list[list[float]] = []

    def loss() -> Tensor:
        seen.append([adapter.scaling["default"] for (adapter,) in adapters])
        return torch.tensor(0.0 if adapters[0][0].scaling["default"] < 2.0 else 1.0)

    for step in range(11):
        twin.before_step(step, loss)
        assert sum(p.requires_grad for (adapter,) in adapters for p in adapter.parameters()) == 1
    assert [sorted(scales) for scales in seen] == [[0.5, 0.5, 2.0, 2.0]] * 3
    assert all(adapter.scaling["default"] == 2.0 for (adapter,) in adapters)
    rewards = torch.exp(-torch.tensor([0.0 if scales[0] < 2.0 else 1.0 for scales in seen]))
    advantage = rewards - rewards.mean()
    expected = [sum(2.5 * float(a) for a, s in zip(advantage, seen, strict=True) if s[i] < 2.0) for i in range(4)]
    assert any(abs(value) > 0.1 for value in expected)
    torch.testing.assert_close(twin.scores, torch.tensor(expected))


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    def none_there(model: Any, steps: int) -> Rival:
        raise RuntimeError("`pip install --no-deps nobody==1`: no index")

    names = (
        "AdamW on everything",
        "apportion, random entries",
        "SHiRA",
        "AdamW, gradients masked",
        "apportion LISA",
        "LISA as in LMFlow",
        "BaseFinetuning, Lightning",
        "the official SaRA",
    )
    chosen = [c for name in names for key, c in EVERYBODY.items() if key.startswith(name)]
    assert len(chosen) == len(names)
    absent = Contender("nobody==1", "layers drawn", "package", none_there, whole, note="never seen")
    plan = Plan(size=TINY, steps=7, turns=1, contenders=lambda: [absent, *chosen])
    with bench_peers.hushed():
        return {row["name"].split(", Lightning")[0]: row for row in bench_peers.measure(plan, lambda doing: None)}


def test_a_peer_that_cannot_be_had_is_reported_and_loses_no_other(rows: dict[str, dict[str, Any]]) -> None:
    assert not rows["nobody==1"]["run"]
    assert rows["nobody==1"]["reason"] == "RuntimeError: `pip install --no-deps nobody==1`: no index"
    assert all(row["run"] for name, row in rows.items() if name != "nobody==1")
    page = section({"model": "tiny", "tokens": 8, "steps": 7, "rows": list(rows.values())})
    assert any("nobody==1" in line and "not run: RuntimeError" in line for line in page)
    assert len({line.count("|") for line in page if line.startswith("| ")}) == 1


def test_bytes_are_those_of_the_formulas(rows: dict[str, dict[str, Any]]) -> None:
    model = whole(TINY)
    everything = sum(p.numel() for p in model.parameters())
    tensors = len(list(model.parameters()))
    dense = rows["AdamW on everything"]
    assert dense["memory"]["weights"] >= 4 * everything  # and rotary frequencies
    assert dense["memory"]["optimizer"] == 8 * everything + 4 * tensors
    assert dense["promises"]["moments"] == 2 * dense["promises"]["selected"] == 2 * everything
    entries = rows["apportion, random entries"]
    k = sum(4 * (p.shape[0] + p.shape[1]) for p in trainable(matrices(TINY)))
    assert entries["promises"]["selected"] == k
    exact = 16 * k + 4 * len(trainable(matrices(TINY)))
    assert exact <= entries["memory"]["held"] <= exact + 2048  # what the model itself remembers of a pass
    shira = next(row for name, row in rows.items() if name.startswith("SHiRA"))["memory"]
    assert 20 * k <= shira["held"] <= 20 * k + 2048  # value, row, column, moments
    sara = rows["the official SaRA"]["memory"]
    assert sara["held"] >= everything  # one byte of mask for each weight, whatever is selected


def test_rivals_of_a_group_take_turns_with_ours(rows: dict[str, dict[str, Any]]) -> None:
    for name in ("LISA as in LMFlow", "BaseFinetuning", "AdamW, gradients masked"):
        found = rows[name]["time"]["to_ours"]
        assert 0.0 < found["lowest"] <= found["ratio"] <= found["highest"]
    assert rows["apportion LISA"]["time"]["to_ours"] is None


def test_promises_are_watched(rows: dict[str, dict[str, Any]]) -> None:
    def kept(name: str) -> tuple[bool, bool]:
        return rows[name]["promises"]["still"], rows[name]["promises"]["follows"]

    assert kept("apportion, random entries") == kept("apportion LISA") == (True, True)
    assert kept("AdamW, gradients masked") == (False, False)  # decay and momentum
    assert kept("LISA as in LMFlow") == kept("BaseFinetuning") == (True, False)  # moments of layers put back
    assert rows["LISA as in LMFlow"]["memory"]["held"] > rows["apportion LISA"]["memory"]["held"]


def test_a_layer_that_moves_although_frozen_is_seen() -> None:
    def leaking(model: Any, steps: int) -> Rival:
        rival = plain(model)
        layers_of(model)[0].requires_grad_(False)
        step = rival.step

        def also() -> None:
            step()
            with torch.no_grad():
                next(layers_of(model)[0].parameters()).view(-1)[0] += 1e-6

        rival.step, rival.trained = also, lambda: training(model)
        return rival

    found = bench_peers.promises(Contender("leaking", "g", "torch", leaking, whole), TINY, 2)
    assert found["still"] is False


def test_who_is_better_is_said() -> None:
    def row(name: str, kind: str, peak: int, held: int, ratio: float) -> dict[str, Any]:
        return {"name": name, "kind": kind, "group": "g", "run": True, "memory": {"peak": peak, "held": held},
                "time": {"ratio": 1.0, "to_ours": None if kind == "ours" else {"ratio": ratio}}}  # fmt: skip

    own, other = row("we", "ours", 100, 100, 1.0), row("they", "package", 50, 120, 0.99)
    assert compared([own, other]) == ["they is better than we: peak 0.50 of ours."]
    assert compared([own, row("they", "package", 100, 100, 0.9)]) == [
        "they is better than we: time of a step 0.90 of ours."
    ]
    assert "No other" in compared([own, row("they", "package", 100, 100, 1.0)])[0]


def test_the_command_fails_if_ours_breaks_a_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(size=TINY, steps=2, turns=1, contenders=lambda: [EVERYBODY["apportion, random entries"]])
    assert main(["--out", str(tmp_path)], plan) == 0
    assert json.loads((tmp_path / "peers.json").read_text())["passed"]
    monkeypatch.setattr(
        bench_peers, "promises", lambda *_: {"still": False, "follows": True, "moments": 0, "selected": 1}
    )
    assert main(["--out", str(tmp_path)], plan) == 1


def wheel(folder: Path) -> str:
    """A package of one module, and its hash."""
    path = folder / "somebody-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("somebody/__init__.py", "NAME = 'somebody'\n")
        file.writestr("somebody-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: somebody\nVersion: 1.0\n")
        file.writestr("somebody-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("somebody-1.0.dist-info/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_packages_are_fetched_once_by_their_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    sha = wheel(tmp_path)
    cache = tmp_path / "cache"
    with pytest.raises(RuntimeError, match=r"`pip install --no-deps somebody==1.0`: .*HASHES"):
        peers.fetch(peers.Package("somebody", "1.0", "somebody", "0" * 64), cache)
    assert not list(cache.iterdir())
    package = peers.Package("somebody", "1.0", "somebody", sha)
    assert peers.module(package, cache=cache).NAME == "somebody"
    monkeypatch.setattr(peers.subprocess, "run", None)  # not asked for again
    assert peers.fetch(package, cache) == cache / "somebody-1.0"

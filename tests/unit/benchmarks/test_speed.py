"""Floors, medians, what runs on which machine, and the page."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import benchmarks.speed
import pytest
from benchmarks.speed import rows as comparisons
from benchmarks.speed.floor import Model, floor_seconds
from benchmarks.speed.page import drawing, growth_points, page
from benchmarks.speed.panels import Panel, panels
from benchmarks.speed.plan import full, once, pairs, settled
from benchmarks.speed.probe import Probe
from benchmarks.speed.rows import CLASSIC, LAST, OURS, core, growth
from benchmarks.speed.store import Store, Summary, fastest, readings_in
from benchmarks.speed.task import Task
from benchmarks.speed.where import KINDS, OTHER, PYTHON, shares

RATES = {
    "copy_bytes_per_second": 85e9,
    "fp32 flops": 200e9,
    "fp32 error": 2.5e-7,
    "fp32 fast flops": 460e9,
    "fp32 fast error": 3.7e-7,
    "bf16 flops": 900e9,
    "bf16 error": 2.9e-3,
}
PEERS = Path(benchmarks.speed.__file__).with_name("peers")
ROUNDING = RATES | {"fp32 fast error": 2.4e-3}
"""A processor whose faster product is no fp32."""


def reading(
    number: int, seconds: float, *, others: float = 0.0, tokens: int = 90
) -> dict[str, Any]:
    """What a process prints for an iteration with two responses of 10 and 20 tokens."""
    return {
        "iteration": number,
        "seconds": seconds,
        "phases": {"rollout": 0.25 * seconds, "scoring": 0.25 * seconds, "update": 0.5 * seconds},
        "prompts": [8, 16],
        "responses": [10, 20],
        "positions": 120,
        "tokens": tokens,
        "peak_bytes": int(seconds * 1e9),
        "other_cores": others,
    }


def test_task_survives_its_text() -> None:
    """And a key that is no setting is refused."""
    task = OURS.on(shape="M", lora=True, epochs=1)
    assert Task.parse(task.text()) == task
    assert task.name == "ours shape=M epochs=1 lora=True"
    with pytest.raises(TypeError):
        Task.parse('{"system": "ours", "lroa": true}')


def test_operations_of_a_pass_over_one_layer() -> None:
    """Counted by hand: four products of attention, two of the feed-forward layer, the scores."""
    model = Model(layers=1, width=4, vocabulary=10, weights=4 * (4 * 4 + 2 * 16))
    assert model.weights == 4 * 16 + 2 * 64
    # Three tokens: 2 operations per weight each; causal scores and mixing 2 * 4 * n^2.
    assert model.trunk([3]) == 2 * 192 * 3 + 2 * 4 * 9
    assert model.trunk([3, 5]) == model.trunk([3]) + model.trunk([5])
    assert model.head(3) == 2 * 4 * 10 * 3
    assert Model.of(Task("ours")).weights == 4 * 12 * 256**2
    assert Model.of(Task("ours", family="llama")).weights == 4 * 256 * (4 * 256 + 3 * 682)


def test_floor_of_an_iteration() -> None:
    """Each phase against its own sum, with weights small enough that decoding is arithmetic."""
    task = Task("ours", shape="tiny", epochs=3)
    model = Model.of(task)
    options: dict[str, Any] = {"flops": 1e9, "bandwidth": 1e30, "weight_bytes": 4}
    found = floor_seconds(task, [5, 7], [3, 2], **options)
    forward = model.trunk([8, 9]) + model.head(5)
    assert found["update"] == pytest.approx(3 * 3 * forward / 1e9, rel=1e-12)
    assert found["scoring"] == pytest.approx((forward + model.trunk([8, 9])) / 1e9, rel=1e-12)
    decoded = 5 * 2 * model.parameters + 4 * 1 * 32 * (5 + 7 + 6 + 8 + 7)
    assert found["rollout"] == pytest.approx((model.trunk([5, 7]) + decoded) / 1e9, rel=1e-12)
    lora = floor_seconds(replace(task, lora=True), [5, 7], [3, 2], **options)
    assert lora["update"] == pytest.approx(found["update"] * 2 / 3, rel=1e-12)
    separate = floor_seconds(replace(task, critic="separate"), [5, 7], [3, 2], **options)
    extra = separate["update"] - found["update"]
    assert extra == pytest.approx(9 * model.trunk([8, 9]) / 1e9, rel=1e-9)


def test_floor_waits_for_memory_where_that_is_slower() -> None:
    """Reading the weights once per token, and the optimizer's traffic once per step."""
    task = Task("ours", shape="tiny", epochs=2)
    parameters = Model.of(task).parameters
    found = floor_seconds(task, [4], [3], flops=1e30, bandwidth=1e6, weight_bytes=2)
    assert found["rollout"] == pytest.approx(3 * 2 * parameters / 1e6, rel=1e-12)
    assert found["update"] == pytest.approx(2 * 28 * parameters / 1e6, rel=1e-12)


@pytest.mark.parametrize(
    ("task", "total"),
    [
        (Task("ours"), 0.35),
        (Task("ours", critic="separate"), 0.58),
        (Task("ours", shape="M"), 7.2),
        (Task("ours", shape="M", critic="separate"), 13.0),
        (Task("ours", shape="M", lora=True), 5.2),
    ],
    ids=lambda value: value.name if isinstance(value, Task) else None,
)
def test_floor_is_that_of_an_independent_count(task: Task, total: float) -> None:
    """584 prompt and 600 response tokens at 460 GFLOP/s, counted apart before this code was."""
    found = floor_seconds(
        task, [36] * 8 + [37] * 8, [37.5] * 16, flops=460e9, bandwidth=85e9, weight_bytes=4
    )
    assert sum(found.values()) == pytest.approx(total, rel=0.08)


def test_medians_are_of_undisturbed_readings() -> None:
    """A reading that others disturbed counts only where there is no other."""
    quiet = [reading(1, 2.0), reading(2, 4.0), reading(3, 3.0)]
    loud = [reading(4, 50.0, others=1.0), reading(5, 60.0, others=1.5)]
    both = Summary(OURS, quiet + loud)
    assert both.seconds == 3.0
    assert both.rate == pytest.approx(10.0)
    assert both.phases["update"] == pytest.approx(1.5)
    assert not both.disturbed
    assert both.padding == pytest.approx(0.25)
    alone = Summary(OURS, loud)
    assert alone.disturbed
    assert alone.seconds == 55.0
    assert alone.peak_bytes == 60e9


def test_rates_count_what_the_work_is_about() -> None:
    """Response tokens, trained tokens, pairs."""
    (one,) = [reading(1, 2.0, tokens=60)]
    assert Summary(OURS, [one]).rate == 15.0
    assert Summary(OURS.on(work="sft"), [one]).rate == 30.0
    # 60 tokens where the mean pair has 30: two pairs in two seconds.
    assert Summary(OURS.on(work="reward"), [one]).rate == pytest.approx(1.0)


def test_store_keeps_and_resumes(tmp_path: Path) -> None:
    """What was run is not run again; the first iteration does not count."""
    store = Store(tmp_path / "readings.jsonl")
    store.add({"rates": RATES, "round": 0})
    store.add({"rates": {"bf16 flops": 950e9}, "round": 1})
    store.add({"task": OURS.text(), "round": 1, "readings": [reading(0, 9.0), reading(1, 2.0)]})
    store.add({"task": CLASSIC.text(), "round": 1, "error": "killed"})
    again = Store(tmp_path / "readings.jsonl")
    assert again.has(1, OURS)
    assert not again.has(2, OURS)
    found = again.of(OURS)
    assert found is not None
    assert found.seconds == 2.0
    assert again.of(CLASSIC) is None
    assert again.failure(CLASSIC) == "killed"
    assert again.rates["bf16 flops"] == 950e9


def test_readings_are_found_among_chatter() -> None:
    """Libraries print what they like."""
    text = "\n".join(["===training===", json.dumps(reading(0, 1.0)), "{'loss': 3}", '{"loss": 3}'])
    assert readings_in(text) == [reading(0, 1.0)]


def test_faster_product_is_given_only_where_it_is_fp32() -> None:
    """On a processor that rounds to bf16 there, nobody gets it, and no task is run twice."""
    asked = OURS.on(precision="fp32", matmul="fast")
    assert settled(asked, RATES).matmul == "default", "the library chooses by itself"
    assert settled(asked, ROUNDING) == settled(OURS.on(precision="fp32"), ROUNDING)
    peer = CLASSIC.on(precision="fp32", matmul="fast")
    assert settled(peer, ROUNDING) == settled(CLASSIC, ROUNDING)
    assert settled(peer, RATES) != settled(CLASSIC, RATES)
    assert fastest(RATES, exact=True) == "fp32 fast"
    assert fastest(ROUNDING, exact=True) == "fp32"
    assert fastest(RATES, exact=False) == "bf16"


def test_plan_measures_what_was_aimed_at_first() -> None:
    """Both shapes before anything else, each comparison's two sides in turn."""
    planned = once([(number, settled(task, RATES)) for number, task in full()])
    assert len(planned) == len(set(planned))
    first = [settled(task, RATES) for task in pairs(core("S", "gpt2"), turned=False)]
    assert [task for _, task in planned[:2]] == first[:2]
    aimed = {settled(t, RATES) for s in "SM" for t in pairs(core(s, "gpt2"), turned=False)}
    assert {task for _, task in planned[: len(aimed)]} == aimed
    assert {1, 2} == {number for number, _ in planned}


def test_every_aim_has_a_row() -> None:
    """Nine speeds and a memory on each shape, and the smaller memory on M."""
    for shape, speeds, memories in (("S", 9, 1), ("M", 9, 3)):
        aimed = [row for row in core(shape, "gpt2") if row.target is not None]
        assert sum(row.measure == "speed" for row in aimed) == speeds
        assert sum(row.measure == "memory" for row in aimed) == memories
    assert all(row.target is None for row in comparisons.rows("S", "llama"))


def filled(folder: Path) -> Store:
    """A store with readings of a few tasks."""
    store = Store(folder / "readings.jsonl")
    store.add({"rates": ROUNDING, "round": 0})
    for task, seconds in ((OURS, 2.0), (CLASSIC, 8.0), (LAST, 12.0)):
        done = settled(task, ROUNDING)
        store.add({"task": done.text(), "round": 1, "readings": [reading(1, seconds)]})
    failed = settled(CLASSIC.on(lora=True), ROUNDING)
    store.add({"task": failed.text(), "round": 1, "error": "no | memory\nleft"})
    for system in (OURS, CLASSIC):
        for task in growth(system):
            seconds = task.batch / 16 * task.response / 64 * task.vocabulary_size / 8192
            done = settled(task, ROUNDING)
            store.add({"task": done.text(), "round": 1, "readings": [reading(1, seconds)]})
    return store


def test_page_says_what_was_measured(tmp_path: Path) -> None:
    """Ratios beside their aims, what failed; every row of a table is whole."""
    store = filled(tmp_path)
    made = {"date": "2026-11-21", "command": "make bench"}
    text = page(store, made, [("S", "gpt2"), ("M", "gpt2")])
    of_s = text[text.index("## GPT-2 S") : text.index("## GPT-2 M")]
    (line,) = [x for x in of_s.splitlines() if x.startswith("| PPO, value head on trunk, `auto`")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:6] == ["TRL 0.11.4", "15 tokens/s", "3.75 tokens/s", "**4.00**", "4"]
    assert "failed: no / memory left" in text
    assert "it is no fp32" in text
    for block in text.split("\n\n"):
        table = [entry for entry in block.splitlines() if entry.startswith("|")]
        assert len({entry.count("|") for entry in table}) <= 1


def test_growth_is_drawn_along_each_axis(tmp_path: Path) -> None:
    """Points in order, every axis beginning where the others are at their default."""
    store = filled(tmp_path)
    found = growth_points(store, OURS, "batch")
    assert [size for size, _ in found] == [8, 16, 32, 64]
    assert [summary.seconds for _, summary in found] == [0.5, 1.0, 2.0, 4.0]
    assert [size for size, _ in growth_points(store, CLASSIC, "vocabulary")] == [
        8192,
        32768,
        131072,
    ]
    root = ET.fromstring(drawing(store))  # noqa: S314 (our own)
    name = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f".//{name}polyline")) == 12


def test_an_empty_panel_says_so() -> None:
    """Instead of dividing by nothing."""
    assert "not measured" in panels([[Panel("seconds", "batch", {})]])


def test_probe_reports_phases_that_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    """With a clock of our own; what no phase had is "other"."""
    ticks = iter([0.0, 1.0, 3.0, 7.0, 7.5, 10.0, 11.0, 12.0])
    probe = Probe(lambda: next(ticks))
    probe.start()
    probe.mark("rollout")
    probe.mark("scoring")
    probe.split({"update": 2.5})
    probe.mark("update")
    probe.stop([3], [4])
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["phases"] == {"rollout": 1.0, "scoring": 2.0, "update": 3.0, "other": 4.0}
    assert found["seconds"] == 10.0
    assert found["peak_bytes"] > 1e7
    assert probe.iteration == 1
    assert not probe.running


@pytest.mark.parametrize("path", sorted(PEERS.glob("*.txt")), ids=lambda path: path.stem)
def test_peers_are_pinned(path: Path) -> None:
    """Exact versions only; torch is ours, and installed before anything that could replace it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", pin) for pin in pins)
    ours = (PEERS.parents[2] / "constraints.txt").read_text(encoding="utf-8").splitlines()
    torch = [pin for pin in pins if pin.startswith("torch==")]
    assert torch == (
        [pin for pin in ours if pin.startswith("torch==")] if path.stem == "torch" else []
    )


def test_operations_are_sorted_by_kind() -> None:
    """By their names in a profile; what no operation took is Python's."""
    spent = {
        "aten::addmm": 4e5,
        "mkldnn::_linear_pointwise": 1e5,
        "aten::_scaled_dot_product_flash_attention_for_cpu": 1e5,
        "aten::_log_softmax": 5e4,
        "aten::gelu_backward": 5e4,
        "aten::copy_": 5e4,
        "aten::mul_": 4e4,
        "aten::sort": 1e4,
    }
    found = shares(spent, 2.0)
    assert list(found) == [*KINDS, OTHER, PYTHON]
    assert [round(share, 3) for share in found.values()] == [
        0.25, 0.05, 0.025, 0.025, 0.0, 0.025, 0.02, 0.005, 0.6,
    ]  # fmt: skip
    assert sum(found.values()) == pytest.approx(1.0)

"""The benchmark runs through; its other networks are the ones they are said to be."""

import json
import multiprocessing
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY_SETTINGS, assert_one_sentence
from torch.utils.flop_counter import FlopCounterMode

import benchmark
from benchmark import forward_flops, kept_bytes, time_in_turns
from config import apply_overrides, full
from peers import Predecessor

CPU = torch.device("cpu")


@pytest.mark.usefixtures("own_directory")
def test_every_part_is_measured_and_written(call, monkeypatch):
    monkeypatch.setattr(benchmark, "IMAGE_SIZES", (8, 16))
    monkeypatch.setattr(benchmark, "MATMUL_SIZE", {"cpu": 64})
    monkeypatch.setattr(benchmark, "DATA_BATCHES", 1)
    monkeypatch.setattr(benchmark, "PICTURES", 128)
    monkeypatch.setattr(benchmark, "WORKERS", 2)
    flags = [word for name, value in TINY_SETTINGS.items() if name.startswith(("model", "data"))
             for word in (f"--{name}", value)]
    flags += ["--device", "cpu", "--batch-size", 3]
    status, said = call(benchmark, *flags, "--rounds", 2, "--sizes")
    assert status == 0, said
    content = json.loads(Path("benchmark.json").read_text())
    assert content["facts"]["batch"] == 3 and content["facts"]["image_size"] == 16
    found = {(m["what"], m["name"]): m for m in content["measurements"]}
    step = found["training step", "ours"]
    assert step["n"] == 2 and step["images"] == 3
    assert found["memory, batch 16", "ours"]["peak_GiB"] > 0.1
    share = found["data", "share of a training step"]["share"]
    assert share == pytest.approx(
        found["data", "ours, from 32x32"]["seconds_per_image"] / step["seconds_per_image"]
    )
    assert {name for what, name in found if what == "training step"} == {
        "ours", "ours, with AdamW", "8x8", "16x16", "alone", "in a group of one"
    }
    assert found["processes", "in a group of one, against alone"]["ratio"] > 0
    assert multiprocessing.active_children() == []


@pytest.mark.usefixtures("own_directory")
def test_what_is_measured_on_cuda_runs_through(monkeypatch):
    """On the CPU, without what only a GPU has; torch's settings are put back."""
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    for name, value in {"MATMUL_SIZE": {"cpu": 64}, "BATCH_SIZES": (2,), "GRID_PICTURES": 2,
                        "GRIDS": (("ddpm", 2),)}.items():
        monkeypatch.setattr(benchmark, name, value)
    overrides = {name: value for name, value in TINY_SETTINGS.items()
                 if name.startswith(("model", "data"))}
    config = apply_overrides(full(), {**overrides, "train.batch_size": "3"})
    report = benchmark.Report(Path("benchmark.json"), {}, CPU, 1)
    switches = ((torch.backends.cudnn, "benchmark"), (torch.backends.cudnn, "allow_tf32"),
                (torch.backends.cuda.matmul, "allow_tf32"))
    before = [getattr(*switch) for switch in switches]
    benchmark.time_grids(report, config)
    benchmark.compare_on_cuda(report, config)
    found = {(m["what"], m["name"], m["images"]) for m in report.content["measurements"]}
    assert found == {
        ("training step", "batch 2", 2), ("grid", "ddpm, 2 steps, guided", 2),
        ("grid", "ddpm, 2 steps, guided, without CUDA graphs", 2),
    } | {
        ("training step", name, 3) for name in benchmark.without_compiled(benchmark.SWITCHES, CPU)
    }
    assert [getattr(*switch) for switch in switches] == before


@pytest.mark.usefixtures("own_directory")
def test_what_has_not_begun_when_the_minutes_are_over_is_left_out(monkeypatch, capsys):
    began = []

    def time_training(report, name, config, images):
        began.append(name)
        monkeypatch.setattr(benchmark.time, "monotonic", lambda: report.ends)

    monkeypatch.setattr(benchmark, "time_training", time_training)
    report = benchmark.Report(Path("benchmark.json"), {}, CPU, 1, minutes=2)
    benchmark.compare_on_cuda(report, full())
    assert began == ["batch 64"]
    said = capsys.readouterr().out
    left_out = ["batch 256", "batch 1024", *benchmark.SWITCHES]
    assert all(f"the minutes are over: {name}\n" in said for name in left_out)


@pytest.mark.parametrize("problem", ["", "no C compiler"])
def test_without_a_compiler_only_what_needs_none_is_measured(monkeypatch, capsys, problem):
    monkeypatch.setattr(benchmark, "missing_compiler", lambda device: problem)
    kept = list(benchmark.without_compiled(benchmark.SWITCHES, CPU))
    said = capsys.readouterr().out
    if problem:
        assert set(benchmark.SWITCHES) - set(kept) == {"compiled with the loss"}
        assert said.startswith("left out") and problem in said and "with the loss" in said
    else:
        assert kept == list(benchmark.SWITCHES) and said == ""


def die(config, name):
    os._exit(9)


@pytest.mark.usefixtures("own_directory")
def test_a_process_that_dies_leaves_the_rest_of_the_benchmark(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "peak_of_a_step", die)
    report = benchmark.Report(Path("benchmark.json"), {}, CPU, 1)
    benchmark.compare_memory(report, full(), ["ours"])
    (record,) = report.content["measurements"]
    assert (record["what"], record["name"]) == ("not measured", "memory of ours")
    assert report.failed == ["memory of ours"]
    assert "not measured: memory of ours (BrokenProcessPool: A process" in capsys.readouterr().out


@pytest.mark.usefixtures("own_directory")
def test_a_row_that_fails_leaves_the_others_and_is_an_error_at_the_end(monkeypatch, call):
    def time_training(report, name, config, images):
        if name == "without CUDA graphs":
            raise AssertionError("capture failed\nat length")
        report.note("training step", name)

    monkeypatch.setattr(benchmark, "time_training", time_training)
    monkeypatch.setattr(benchmark, "missing_compiler", lambda device: "")
    for name, result in {"compare_memory": None, "compare_networks": {"ours": 1},
                         "compare_data": 1, "compare_processes": None}.items():
        monkeypatch.setattr(benchmark, name, lambda *arguments, result=result: result)
    monkeypatch.setattr(benchmark, "compare_sizes", benchmark.compare_on_cuda)
    status, said = call(benchmark, "--device", "cpu", "--sizes")
    assert status == 1
    assert_one_sentence(said, "not measured, for the reasons above: without CUDA graphs")
    records = json.loads(Path("benchmark.json").read_text())["measurements"]
    (failed,) = [record for record in records if record["what"] == "not measured"]
    assert (failed["name"], failed["reason"]) == (
        "without CUDA graphs", "AssertionError: capture failed"
    )
    measured = {record["name"] for record in records if record["what"] == "training step"}
    assert measured == {"batch 64", "batch 256", "batch 1024", *benchmark.SWITCHES} - {
        "without CUDA graphs"
    }


def own_oom_score(config, name):
    score = float(Path("/proc/self/oom_score_adj").read_text())
    return score, score


@pytest.mark.usefixtures("own_directory")
def test_the_system_ends_a_network_that_takes_all_memory_before_the_benchmark(monkeypatch):
    monkeypatch.setattr(benchmark, "peak_of_a_step", own_oom_score)
    report = benchmark.Report(Path("benchmark.json"), {}, CPU, 1)
    benchmark.compare_memory(report, full(), ["ours"])
    assert report.content["measurements"][0]["peak_GiB"] == 1000


@pytest.mark.usefixtures("own_directory")
def test_a_batch_size_has_to_be_a_number(call):
    status, said = call(benchmark, "--device", "cpu", "--batch-size", "auto")
    assert status == 1
    assert_one_sentence(said, "must be a number, not auto")


@pytest.mark.usefixtures("own_directory")
def test_a_place_for_the_figures_is_wanted_before_they_are_measured(call):
    status, said = call(benchmark, "--device", "cpu", "--json", "nowhere/figures.json")
    assert status == 1
    assert_one_sentence(said, "--json nowhere/figures.json")


@pytest.mark.usefixtures("own_directory")
def test_what_was_measured_is_kept_whatever_happens_later():
    report = benchmark.Report(Path("benchmark.json"), {"device": "CPU"}, CPU, 1)
    report.note("network", "ours", parameters_M=1)
    content = json.loads(Path("benchmark.json").read_text())
    assert content["measurements"] == [{"what": "network", "name": "ours", "parameters_M": 1}]
    report.add("training step", "ours", [1.0, 3.0, 2.0], 4, flops=8, peak=16)  # seconds
    assert json.loads(Path("benchmark.json").read_text())["measurements"][1:] == [{
        "what": "training step", "name": "ours", "n": 3, "images": 4, "seconds_per_image": 0.5,
        "images_per_second": 2.0, "fastest": 0.25, "slowest": 0.75, "share_of_peak": 0.25,
    }]


@pytest.mark.parametrize("calls", [1, 3])
def test_calls_take_turns_and_the_first_ones_do_not_count(monkeypatch, calls):
    monkeypatch.setattr(benchmark, "CALLS", {"cpu": calls})
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now)
    order, now = [], 0.0

    def work(name):
        nonlocal now
        order.append(name)
        now += {"a": 1.0, "b": 2.0}[name]

    times = time_in_turns({name: partial(work, name) for name in "ab"}, 3, CPU)
    assert order == (["a"] * calls + ["b"] * calls) * (3 + benchmark.BURN_IN)
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3}  # of one call


def test_what_is_kept_for_backward_is_counted_once():
    """A squared convolution: its input and output, 8x8x(3 + 5) numbers, but not its weights."""

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 5, 1)

        def forward(self, x_t, timesteps, class_labels):
            h = self.layer(x_t)
            return h * h

    assert kept_bytes(Network(), 8, CPU, None) == 8 * 8 * (3 + 5) * 4


def test_predecessor_has_the_published_size_and_cost():
    """173 million parameters and 65.5 GFLOP at 128x128."""
    with torch.device("meta"):
        model = Predecessor(128)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(173e6, rel=0.001)
    x_t, one = torch.empty(1, 3, 128, 128, device="meta"), torch.ones(1, device="meta").long()
    with FlopCounterMode(display=False) as counter:
        assert model(x_t, one, one).shape == x_t.shape
    assert counter.get_total_flops() == pytest.approx(65.5e9, rel=0.001)


def test_flops_of_a_convolution_are_two_per_product():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 5, 1)

        def forward(self, x_t, timesteps, class_labels):
            return self.layer(x_t)

    assert forward_flops(Network(), 8, CPU) == 2 * 3 * 5 * 8 * 8

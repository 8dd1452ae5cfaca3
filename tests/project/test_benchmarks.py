"""The benchmarks: all peers compute the same, targets and comparisons are right. No test depends on times."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import gatewise as gw
import numpy as np
import pytest
from gatewise.__main__ import main as gatewise_main
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks import cases, checks, measurement, peers, report, worker
from benchmarks.targets import Target, target_of
from benchmarks.workloads import (
    CELL,
    DENSE,
    EMBEDDING,
    FORWARD,
    HOMES,
    LAYER,
    MODULE,
    NETWORK,
    ONE_LONG,
    PACKED,
    PLAIN,
    POOL,
    PROGRAM,
    QUICK,
    RAGGED,
    RESETS,
    RUN,
    STEP,
    TRAIN,
    WORKLOADS,
    Block,
    Workload,
    network,
)

SMALL = [
    Workload(mode, cell, 1 if mode in (STEP, POOL) else 4, 3, 5, 6, dtype=dtype)
    for mode in (FORWARD, TRAIN, STEP, POOL)
    for cell in ("LSTM", "GRU")
    for dtype in ("float32", "float64")
] + [
    Workload(mode, cell, *sizes)
    for mode in (FORWARD, TRAIN)
    for cell in ("LSTM", "GRU")
    for sizes in (
        (4, 3, 5, 6, 2, 2),
        *((16, 3, 5, 6, 1, 1, "float32", rows) for rows in (RAGGED, ONE_LONG, RESETS)),
        (16, 3, 5, 6, 1, 1, "float32", "", 4),
    )
]
SMALL += [
    Workload(mode, cell, 1 if mode in (CELL, LAYER) else 16, 3, 5, 6, rows=rows)
    for cell in ("LSTM", "GRU")
    for mode, rows in (
        (MODULE, ""),
        (MODULE, RAGGED),
        (MODULE, PACKED),
        (CELL, ""),
        (LAYER, ""),
        (PROGRAM, ""),
        (PROGRAM, RAGGED),
    )
]
SMALL += [Workload(mode, cell, 1, 3, 5, 6, frozen=True) for cell in ("LSTM", "GRU") for mode in (CELL, LAYER)]
SMALL += [Workload(RUN, cell, 4, batch, 5, 6) for cell in ("LSTM", "GRU") for batch in (1, 3)]
SMALL += [
    network(Block("LSTM", 5, 6), Block(DENSE, 6, 3)),
    network(Block("GRU", 5, 6), Block("LSTM", 6, 7), Block(DENSE, 7, 4, "relu"), Block(DENSE, 4, 1, "sigmoid")),
    network(Block(EMBEDDING, 9, 5), Block("LSTM", 5, 6), Block(DENSE, 6, 3)),
]
ROOT = Path(measurement.__file__).parents[1]
FIRST, SECOND = "LSTM forward 100x1x64", "GRU train 100x32x128"


@pytest.fixture(autouse=True)
def same_number_of_threads():
    """A peer sets the number of threads of its whole process."""
    threads = gw.get_num_threads()
    yield
    gw.set_num_threads(threads)


def row(name=FIRST, threads=1, share=0.9, **ratios):
    """A row with peers and their ratios, each with quartiles 1 % around it."""
    return {
        "name": name,
        "threads": threads,
        "seconds": 2e-4,
        "gflops": 33.0,
        "share": share,
        "share_best": share,
        "bandwidth_share": None,
        "peers": {
            peer.replace("_", " "): {"seconds": 1.0, "ratio": ratio, "low": ratio * 0.99, "high": ratio * 1.01}
            for peer, ratio in ratios.items()
        },
        "failed": {},
        "memory": None,
        "latency": None,
    }


def document(*rows):
    return {"made": {}, "how": {}, "skipped": {}, "rows": list(rows), "cold": []}


def render(tables, width=140):
    console = Console(width=width)
    with console.capture() as capture:
        for table in tables:
            console.print(table)
    return capture.get()


# ---- workloads and targets


def test_names_are_unique_and_quick_ones_exist():
    assert len({w.name for w in WORKLOADS.values()}) == len(WORKLOADS)
    assert all(name in WORKLOADS for name in QUICK)


@pytest.mark.parametrize(
    ("name", "threads", "target"),
    [
        ("LSTM forward 100x1x64", 1, Target(1.9)),
        ("LSTM forward 100x1x64", 2, Target(2.5)),
        ("GRU forward 25x64x512", 1, Target(1.15, 0.88)),
        ("LSTM train 100x32x128", 1, Target(1.25, 0.85)),
        ("LSTM train 100x32x128", 2, Target(1.4)),
        ("LSTM train 100x1x64", 1, Target(3)),
        ("LSTM step 1x16", 1, Target(25)),
        ("GRU step 8x128", 1, Target(1)),
        ("GRU run 64x1x32", 1, Target(1, others={PLAIN: 1})),
        ("LSTM train 50x32x128 float64", 1, Target(1)),
        ("GRU forward 100x3x50", 2, Target(1)),
    ],
)
def test_target_of_a_workload(name, threads, target):
    assert target_of(WORKLOADS[name], threads) == target


def test_targets_of_uneven_rows():
    ragged, resets = (WORKLOADS[f"LSTM forward 100x32x128 {rows}"] for rows in (RAGGED, RESETS))
    share = ragged.operations / WORKLOADS["LSTM forward 100x32x128"].operations
    assert 0.5 < share < 0.75
    target = target_of(ragged, 1)
    assert (target.ratio, target.others["PyTorch"]) == (1, 3)
    assert target.others[PLAIN] == pytest.approx(1 / share / 1.15)
    assert target_of(resets, 1).others == {PLAIN: 0.97}
    slow = row(ragged.name, **{"PyTorch": 2.0, "gatewise plain": 1.5, "PyTorch padded": 1.2})
    assert report.best_peer(slow)[0] == "PyTorch padded"
    assert report.missed(document(slow)) == [f"{ragged.name}, 1 thread: ratio to PyTorch 2.00, target 3.00"]


def test_targets_of_a_network_with_tokens():
    name = "network Embedding 1000x128 + LSTM 128 + Dense 64"
    assert target_of(WORKLOADS[name], 1).ratio == target_of(WORKLOADS["network LSTM 64 + Dense 8"], 1).ratio == 1
    good = row(name, **{"gatewise plain": 0.8, "ONNX Runtime": 6.0, "ONNX Runtime bound": 5.5})
    assert report.missed(document(good)) == []
    slow = row(name, **{"gatewise plain": 0.7, "ONNX Runtime": 5.5, "ONNX Runtime bound": 4.5})
    assert report.missed(document(slow)) == [
        f"{name}, 1 thread: ratio to gatewise plain 0.70, target 0.77",
        f"{name}, 1 thread: ratio to ONNX Runtime bound 4.50, target 5.00",
    ]


def test_operations_and_bytes_of_a_network():
    of_tokens = network(Block(EMBEDDING, 9, 5), Block("LSTM", 5, 6), Block(DENSE, 6, 3))
    assert (of_tokens.operations, of_tokens.weight_bytes) == (2 * (4 * 6 * 6 + 6 * 3), 4 * (4 * 6 * 6 + 6 * 3))
    assert network(Block("GRU", 5, 6)).operations == Workload(STEP, "GRU", 1, 1, 5, 6).operations


def test_operations_and_bytes_of_a_stack():
    workload = Workload(TRAIN, "LSTM", 10, 2, 3, 4, layers=2, directions=2)
    multiplications = 10 * 2 * 4 * 4 * 2 * ((3 + 4) + (8 + 4))
    assert workload.operations == 3 * 2 * multiplications
    assert Workload(STEP, "GRU", 1, 1, 3, 4).weight_bytes == 3 * 4 * (3 + 4) * 4


# ---- every peer computes what the reference computes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "workload"),
    [
        pytest.param(name, workload, id=f"{workload.name}-{name}")
        for workload in SMALL
        for name in ("gatewise", *peers.PEERS)
        if not peers.peer_named(name).refusal(workload)
    ],
)
def test_a_peer_agrees_with_the_reference(name, workload):
    """In every workload that it does not refuse: an exception is a failure, whatever its kind."""
    peer = peers.peer_named(name)
    try:
        peers.versions(peer.modules)
    except metadata.PackageNotFoundError as missing:
        pytest.skip(f"{missing.name} is not installed")
    case = cases.make_case(workload, 1)
    checks.check(case, peer.make(case), checks.reference_results(case, padded=peer.computes_padding))


EVEN, BOTH_WAYS = Workload(FORWARD, "LSTM", 16, 3, 5, 6), Workload(FORWARD, "GRU", 16, 3, 5, 6, 1, 2)
VARIETIES = {
    "forward": EVEN,
    "both ways": BOTH_WAYS,
    "float64": replace(EVEN, dtype="float64"),
    "ragged": replace(EVEN, rows=RAGGED),
    "ragged both ways": replace(BOTH_WAYS, rows=RAGGED),
    "resets": replace(EVEN, rows=RESETS),
    "train": replace(EVEN, mode=TRAIN),
    "checkpoint": replace(EVEN, mode=TRAIN, checkpoint_every=4),
    "step": Workload(STEP, "LSTM", 1, 3, 5, 6),
    "pool": Workload(POOL, "LSTM", 1, 3, 5, 6),
    "run": Workload(RUN, "LSTM", 4, 3, 5, 6),
    "network": network(Block("LSTM", 5, 6), Block(DENSE, 6, 3)),
    "module": replace(EVEN, mode=MODULE),
    "cell": Workload(CELL, "LSTM", 1, 3, 5, 6),
    "layer": Workload(LAYER, "LSTM", 1, 3, 5, 6),
    "program": replace(EVEN, mode=PROGRAM),
}
IN_FRAMEWORKS = {"module", "cell", "layer", "program"}
NO_ONNX = {"float64", "ragged", "ragged both ways", "resets", "train", "checkpoint", *IN_FRAMEWORKS}
REFUSED = {
    "gatewise": set(),
    PLAIN: {"forward", "both ways", "float64", "train", "step", *IN_FRAMEWORKS},
    "PyTorch": {"resets", "program"},
    "PyTorch padded": VARIETIES.keys() - {"ragged"},
    "ONNX Runtime": NO_ONNX,
    "ONNX Runtime bound": NO_ONNX,
    "OpenVINO": NO_ONNX | {"network"},
    "JAX": {"ragged both ways", "resets", "run", "network", "module", "cell", "layer"},
    "TensorFlow": {"ragged", "ragged both ways", "resets", "run", "network", *IN_FRAMEWORKS},
}


@pytest.mark.parametrize("name", ["gatewise", *peers.PEERS])
def test_a_peer_refuses_only_what_it_cannot_do(name):
    """A refusal takes a workload out of the tests, too."""
    reasons = {variety: peers.peer_named(name).refusal(workload) for variety, workload in VARIETIES.items()}
    assert {variety for variety, reason in reasons.items() if reason is not None} == REFUSED[name]
    assert "" not in reasons.values()


def test_the_check_sees_a_wrong_number():
    case = cases.make_case(Workload(TRAIN, "GRU", 4, 3, 5, 6), 1)
    party, expected = peers.GATEWISE.make(case), checks.reference_results(case)
    checks.check(case, party, expected)
    for name in ("output", "weight_hh_l0"):
        wrong = expected | {name: expected[name] * 1.001}
        with pytest.raises(ValueError, match=f"wrong {name}"):
            checks.check(case, party, wrong)
    with pytest.raises(ValueError, match="wrong output"):
        checks.check(case, party, expected | {"output": np.full_like(expected["output"], np.nan)})


def test_the_check_sees_a_missing_result_and_a_wrong_shape():
    case = cases.make_case(Workload(TRAIN, "GRU", 4, 3, 5, 6), 1)
    party, expected = peers.GATEWISE.make(case), checks.reference_results(case)

    def changed(change):
        return party._replace(collect=lambda result: change(party.collect(result)))

    def without_recurrent_weights(results):
        return {name: value for name, value in results.items() if name != "weight_hh_l0"}

    with pytest.raises(ValueError, match="no weight_hh_l0 among the results"):
        checks.check(case, changed(without_recurrent_weights), expected)
    with pytest.raises(ValueError, match=r"wrong output: shape \(1, 3, 6\), expected \(4, 3, 6\)"):
        checks.check(case, changed(lambda results: results | {"output": results["output"][:1]}), expected)


# ---- the worker


def test_a_cold_start_begins_before_gatewise_is_imported():
    """The harness imports gatewise where it uses it."""
    code = "import sys, benchmarks.worker; assert 'numpy' in sys.modules; print('gatewise' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_a_job_is_answered_line_by_line(monkeypatch):
    good, bad = Workload(FORWARD, "LSTM", 4, 1, 5, 6), Workload(TRAIN, "LSTM", 4, 1, 5, 6)

    def make(case):
        if case.workload == bad:
            raise RuntimeError("out of order")
        return peers.GATEWISE.make(case)

    monkeypatch.setitem(WORKLOADS, good.name, good)
    monkeypatch.setitem(WORKLOADS, bad.name, bad)
    monkeypatch.setitem(peers.PEERS, "Other", peers.GATEWISE._replace(make=make))
    job = {"task": "pairs", "peer": "Other", "threads": 1, "workloads": [good.name, bad.name], "seconds": 0.001}
    first, second = worker.results(job)
    assert first["result"]["low"] <= first["result"]["ratio"] <= first["result"]["high"]
    assert second["failed"] == "RuntimeError: out of order"
    json.dumps([first, second])


def test_limits_and_latency_of_a_small_step(monkeypatch):
    step = Workload(STEP, "GRU", 1, 1, 5, 6)
    monkeypatch.setitem(WORKLOADS, step.name, step)
    job = {"threads": 1, "workloads": [step.name], "seconds": 0.001, "calls": 1000}
    (limits,), (latency,) = (list(worker.results(job | {"task": task})) for task in ("limits", "latency"))
    assert limits["result"]["share"] > 0
    assert limits["result"]["bandwidth_share"] > 0
    times = latency["result"]
    assert times["calls"] == 1000 == sum(count for _, count in times["histogram"])
    assert times["p50"] <= times["p99"] <= times["p99.9"] <= times["max"]


def test_the_machines_limits_are_measured():
    assert worker.peak("float32", 1) > 1e8
    assert worker.bandwidth("float64", 2, 1 << 20) > 1e8


# ---- the report


def test_missed_targets():
    passing = row(PyTorch=2.0, OpenVINO=2.1)
    assert report.missed(document(passing)) == []
    assert report.missed(document(row())) == []  # no peer, no ratio
    slow = row(PyTorch=3.0, OpenVINO=1.5)
    assert report.missed(document(slow)) == [f"{FIRST}, 1 thread: ratio to OpenVINO 1.50, target 1.9"]
    below = row(SECOND, share=0.8, JAX=2.0)
    assert report.missed(document(below)) == [f"{SECOND}, 1 thread: 80% of the peak, target 82%"]
    assert report.missed(document(row("LSTM of an earlier version", PyTorch=0.1))) == []


def test_a_failure_of_gatewise_or_a_peer_is_reported():
    reasons = {"gatewise": "ValueError: wrong output", "ONNX Runtime": "RuntimeError: no", "A former peer": "gone"}
    results = document(row(PyTorch=2.0) | {"failed": reasons})
    assert report.failed(results) == [
        f"{FIRST}, 1 thread: gatewise: ValueError: wrong output",
        f"{FIRST}, 1 thread: ONNX Runtime: RuntimeError: no",
    ]
    refused = row("LSTM forward 50x32x128 float64") | {"failed": {"OpenVINO": "computes in float32 only"}}
    assert report.failed(document(refused)) == []


def test_against_earlier_results():
    old = document(row(PyTorch=2.0, JAX=3.0), row(SECOND, JAX=2.0))
    assert report.against(copy.deepcopy(old), old) == []
    slower = document(row(PyTorch=1.8, JAX=2.7), row(SECOND, JAX=1.0))
    lines = report.against(slower, old)
    assert [line.split(",")[0] for line in lines] == [SECOND, FIRST]  # the worst first
    assert "PyTorch 2.00 -> 1.80" in lines[1]
    assert report.against(document(row(PyTorch=1.8, OpenVINO=1.0)), document(row(JAX=3.0))) == []  # no peer in both
    overlapping = document(row(PyTorch=1.8))
    overlapping["rows"][0]["peers"]["PyTorch"]["high"] = 2.1
    assert report.against(overlapping, old) == []


def test_tables_and_markdown():
    distribution = {"p50": 400, "p99": 500, "p99.9": 900, "max": 10_000, "histogram": [[400, 5], [900, 1]]}
    step = row("LSTM step 1x16", PyTorch=30.0) | {"latency": {"calls": 6, "empty": distribution, **distribution}}
    train = row(SECOND, JAX=1.2, PyTorch=3.0) | {"memory": {"gatewise": 10_000_000, "PyTorch": 20_000_000}}
    results = document(step, train, row(threads=2, PyTorch=4.0), row(ONNX_Runtime=1.5))
    results["cold"] = [{"who": "gatewise", "import": 0.01, "first": 0.02, "second": 0.001}]
    text = render(report.tables(results))
    for expected in ("1.20 !", "PyTorch", "torch 3.0", "2.00", "0.40 (0.40)", "20.0", "2 threads"):
        assert expected in text
    table = report.markdown(results)
    assert f"| {FIRST} | 200 us | 90% | ONNX Runtime | 1.50 | 4.00 (PyTorch) |" in table


@pytest.mark.parametrize(
    ("number", "text"), [(0.0123, "0.0123"), (1.4, "1.40"), (43, "43.0"), (999.7, "1000"), (1510.2, "1510"), (0, "0")]
)
def test_three_digits(number, text):
    assert report.three_digits(number) == text


def test_a_full_table_fits_120_columns():
    slow = {p: 1.5 + i for i, p in enumerate(["ONNX_Runtime_bound", "ONNX_Runtime", "OpenVINO", "TensorFlow"])}
    wide = row("LSTM forward 100x16x128 I64 2 layers both ways", **slow) | {"gflops": 1510.2, "bandwidth_share": 0.5}
    text = " ".join(render(report.tables(document(wide)), 120).split())
    for expected in ("ort bound 1.50 ", "ort 2.5,", "openvino", "tf", "4.5", "1510", "both ways"):
        assert expected in text


def test_figures(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    distribution = {"p50": 400, "p99": 500, "p99.9": 900, "max": 10_000, "histogram": [[400, 5], [900, 1]]}
    step = row("LSTM step 1x16", PyTorch=30.0) | {"latency": {"calls": 6, "empty": distribution, **distribution}}
    others = [step | {"name": name} for name in ("LSTM pool 1x64", "LSTM module 100x1x64")]
    others.append(step | {"name": "network LSTM 64 + Dense 8"})
    assert plot.figures(document(), tmp_path) == plot.figures(document(*others), tmp_path) == []
    written = plot.figures(document(step, *others, row(PyTorch=2.0), row(threads=2, PyTorch=2.0)), tmp_path)
    assert [path.name for path in written] == ["ratios.png", "peak.png", "latency.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


# ---- the command


@pytest.mark.parametrize(
    "arguments", [["--peers", "Nobody"], ["--threads", "0"], ["--only", "no such name"], ["--show", "no-such-file"]]
)
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_list_and_show(tmp_path, capsys):
    assert command.main(["--list"]) == 0
    assert capsys.readouterr().out.split("\n")[:-1] == list(WORKLOADS)
    file = tmp_path / "results.json"
    file.write_text(json.dumps(document(row(PyTorch=2.0))))
    assert command.main(["--show", str(file)]) == 0
    file.write_text(json.dumps(document(row(PyTorch=1.0))))
    assert command.main(["--show", str(file)]) == 0
    output = capsys.readouterr().out
    assert "1 target is not reached:" in output
    assert "target 1.9" in output
    assert "target: the ratio" in output


@pytest.mark.parametrize("file", sorted(command.RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_published_results_are_shown(file):
    """The exit status is 0, whatever their targets."""
    assert command.main(["--show", str(file)]) == 0


@pytest.mark.parametrize(
    ("ratio", "failures", "status"), [(2.0, {}, 0), (1.0, {}, 1), (2.0, {"JAX": "RuntimeError: [no]"}, 1)]
)
def test_the_exit_status_of_measurements(monkeypatch, capsys, ratio, failures, status):
    results = document(row(PyTorch=ratio) | {"failed": failures})
    monkeypatch.setattr(command, "measure", lambda options, command: (results, True))
    assert command.main(["--quick"]) == status
    assert ("1 measurement failed:" in capsys.readouterr().out) == bool(failures)


@pytest.mark.parametrize(("load", "threads", "busy"), [(0.4, 1, False), (1.6, 1, True), (1.6, 2, False)])
def test_a_warning_of_a_busy_machine(monkeypatch, capsys, load, threads, busy):
    monkeypatch.setattr(command.os, "getloadavg", lambda: (load, 0.0, 0.0))
    command.warn_of_load(threads)
    warning = "this machine is busy: its load average is 1.6, the measurements use 1 thread."
    assert (warning in capsys.readouterr().err) == busy


def test_the_warning_comes_before_anything_is_measured(monkeypatch):
    calls = []
    monkeypatch.setattr(command, "warn_of_load", lambda threads: calls.append(threads))
    monkeypatch.setattr(command, "measure", lambda *_: calls.append("measured") or (document(), True))
    assert command.main(["--quick"]) == 0
    assert calls == [1, "measured"]


def test_progress_says_one_thread_in_the_singular(monkeypatch):
    rich = pytest.importorskip("rich.progress")
    shown = []
    monkeypatch.setattr(rich.Progress, "update", lambda self, *_, description, **__: shown.append(description))
    monkeypatch.setattr(measurement, "work", lambda job: [{"name": name, "failed": ""} for name in job["workloads"]])
    measurement.measure(command.parse(["--quick", "--peers"]), "a test")
    assert shown
    assert all(text.endswith(", 1 thread") for text in shown)


def test_a_missing_package_is_named_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert command.main(["--quick"], "gatewise bench --peers") == 2
    message = capsys.readouterr().err
    assert message == "gatewise bench --peers: rich is missing; try: pip install 'gatewise[bench]'\n"
    monkeypatch.setattr(command, "find_spec", lambda name: name != "matplotlib" or None)
    assert command.main(["--quick", "--plot"]) == 2
    assert "matplotlib is missing" in capsys.readouterr().err


@pytest.mark.parametrize(("peers", "warns"), [([], True), ([PLAIN], True), ([PLAIN, "PyTorch"], False)])
def test_a_warning_of_a_measurement_without_peers(monkeypatch, capsys, peers, warns):
    monkeypatch.setattr(command, "find_peers", lambda names: (peers, {"JAX": "jax is not installed"}, {}))
    command.warn_of_missing_peers(None)
    assert ("none of the peers is installed; try: pip install 'gatewise[bench]'" in capsys.readouterr().err) == warns


# The harness as a part of gatewise, as in a wheel.
INSTALLED = f"""
import sys, gatewise, gatewise.__main__
gatewise.__path__.append({str(ROOT)!r})
sys.exit(gatewise.__main__.main(sys.argv[1:]))
"""


def gatewise_bench(*arguments, **options):
    command = [sys.executable, "-c", INSTALLED, "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def test_an_installed_harness_measures(tmp_path):
    file = tmp_path / "results.json"
    name = "LSTM run 64x1x16"
    arguments = ("--only", name, "--threads", "1", "--seconds", "0.01", "--calls", "1000", "--json", str(file))
    run = gatewise_bench("--peers", PLAIN, *arguments, cwd=tmp_path)
    assert run.returncode in (0, 1), run.stderr  # 1: a target was missed
    results = json.loads(file.read_text())
    assert results["made"]["command"].startswith("gatewise bench --peers --peers 'gatewise plain' --only 'LSTM run")
    assert [(row["name"], list(row["peers"]), row["failed"]) for row in results["rows"]] == [(name, [PLAIN], {})]
    assert [start["who"] for start in results["cold"]] == ["gatewise"]
    assert results["cold"][0]["import"] > 1e-3  # it was not imported before


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (("--peers", "--list"), 0, FIRST),
        (("--peers", "--help"), 0, 'gatewise bench --peers --only "GRU forward"'),
        (("--peers", "Nobody"), 2, "gatewise bench --peers: error: --peers: expected some of gatewise plain, PyTorch"),
        (("--peers", "--window", "3"), 2, "gatewise bench --peers: error: unrecognized arguments: --window 3"),
        (("model.keras", "--peers"), 2, "argument --peers: not allowed with argument FILE"),
        (("--threads", "1", "--peers"), 2, "argument --peers: expected --threads after it, got it before"),
        ((), 2, "one of the arguments FILE --peers is required"),
        (("--help",), 0, "gatewise bench --peers --help"),
    ],
)
def test_the_command_line_of_an_installed_harness(arguments, status, text):
    run = gatewise_bench(*arguments)
    assert run.returncode == status
    assert text in " ".join((run.stdout + run.stderr).split())


def test_an_installation_without_the_benchmarks(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gatewise.benchmarks", None)
    assert gatewise_main(["bench", "--peers"]) == 2
    assert "there are no benchmarks in this installation; try: python -m benchmarks" in capsys.readouterr().err


def install(folder, module, distribution, number):
    """Write the files by which Python knows an installed distribution."""
    (folder / module).mkdir()
    (folder / module / "__init__.py").touch()
    about = folder / f"{distribution.replace('-', '_')}-{number}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {number}\n")
    (about / "top_level.txt").write_text(f"{module}\n")


@pytest.mark.parametrize("distribution", ["tensorflow", "tensorflow-cpu", "intel-tensorflow", "tf-nightly"])
def test_tensorflow_is_found_under_all_its_names(monkeypatch, tmp_path, distribution):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [importlib.machinery.PathFinder])
    for name in ("tensorflow", "keras"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(metadata.PackageNotFoundError, match="tensorflow"):
        peers.versions(peers.PEERS["TensorFlow"].modules)
    install(tmp_path, "tensorflow", distribution, "2.99.0")
    install(tmp_path, "keras", "keras", "3.99.0")
    importlib.invalidate_caches()
    peers._distributions.cache_clear()
    assert peers.versions(peers.PEERS["TensorFlow"].modules) == {distribution: "2.99.0", "keras": "3.99.0"}
    peers._distributions.cache_clear()


def test_jobs_cover_every_workload_that_a_peer_does_not_refuse():
    options = command.parse(["--threads", "1", "--seconds", "1"])
    jobs = list(measurement.jobs(options, ["gatewise plain", "PyTorch", "OpenVINO"]))
    limits = next(job for job in jobs if job["task"] == "limits")
    assert limits["workloads"] == list(WORKLOADS)
    pairs = {job["peer"]: job["workloads"] for job in jobs if job["task"] == "pairs"}
    assert pairs["PyTorch"] == [
        name for name, workload in WORKLOADS.items() if workload.rows != RESETS and workload.mode != PROGRAM
    ]
    assert not any(WORKLOADS[name].mode == TRAIN for name in pairs["OpenVINO"])
    assert not any(WORKLOADS[name].mode in (NETWORK, *HOMES) for name in pairs["OpenVINO"])
    assert any(WORKLOADS[name].mode == NETWORK for name in pairs["gatewise plain"])

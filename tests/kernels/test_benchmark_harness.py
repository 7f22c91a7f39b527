"""The benchmark harness on a CPU: the CSV's header, the gate on correctness, missing peers, the table and the plot."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import bench_decode_ops, bench_linear_kl, bench_ssd_scan, plot, run
from benchmarks.ceilings import Ceilings, measure_ceilings
from benchmarks.harness import COLUMNS, OURS, Case, Run, newest, read_rows, relative_error, run_case, write_rows
from benchmarks.table import best_peer, table

CPU = torch.device("cpu")
HEADER = (
    "operator,shape,dtype,implementation,direction,median_ms,peak_mib,limit_ms,correct,gpu,torch,triton,date".split(",")
)


def product(scale=1.0, key="out"):
    def make(inputs):
        left, right = inputs
        return lambda: left @ right * scale, lambda result: {key: result}

    return make


def missing(inputs):
    import a_peer_that_nobody_has  # noqa: F401


def broken(inputs):
    raise ValueError("size not supported\nlong explanation")


def case(**implementations):
    return Case(
        operator="product",
        shape="8x8",
        dtype="float32",
        direction="fwd",
        inputs=lambda: (torch.randn(8, 8), torch.randn(8, 8)),
        implementations=implementations,
        reference=lambda inputs: {"out": inputs[0].double() @ inputs[1].double()},
        limit_ms=lambda ceilings: ceilings.gemm_ms(2 * 8**3),
        tolerance=1e-5,
    )


@pytest.fixture
def quick():
    return Run(CPU, Ceilings(100.0, 1.0), quick=True, date="2026-01-01T00:00:00Z")


def row(**fields):
    return {**dict.fromkeys(COLUMNS, ""), "operator": "product", "shape": "8x8", "date": "2026-01-01", **fields}


def test_the_csv_has_exactly_the_agreed_columns_and_grows(tmp_path: Path, quick: Run) -> None:
    path = tmp_path / "deep" / "product.csv"
    for _ in range(2):
        write_rows(path, [result.row(quick) for result in run_case(case(posttrain=product()), quick)])
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0] == HEADER
    assert len(lines) == 3
    first = read_rows(path)[0]
    assert float(first["median_ms"]) > 0 and first["correct"] == "true" and first["gpu"] == "cpu"
    assert first["peak_mib"] == "" and first["torch"] == torch.__version__ and first["date"] == "2026-01-01T00:00:00Z"


def test_a_file_with_another_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    path.write_text("operator,ms\nproduct,1\n")
    with pytest.raises(ValueError, match="has the columns"):
        write_rows(path, [row()])
    with pytest.raises(ValueError, match="missing or unknown: date"):
        write_rows(tmp_path / "new.csv", [{name: "" for name in COLUMNS if name != "date"}])
    assert path.read_text() == "operator,ms\nproduct,1\n" and not (tmp_path / "new.csv").exists()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (product(1.01), "out off by 1.00e-02, allowed 1e-05"),
        (product(float("nan")), "out off by nan"),
        (product(key="other"), "no output out"),
        (lambda i: (lambda: i[0][:, :1], lambda r: {"out": r}), "out has shape (8, 1), not (8, 8)"),
    ],
    ids=["scaled", "nan", "unnamed", "shape"],
)
def test_a_wrong_implementation_is_timed_but_marked_and_never_wins(make, words: str, quick: Run) -> None:
    wrong, right = run_case(case(wrong=make, eager=product()), quick)
    assert wrong.correct is False and wrong.timing and words in wrong.reason
    assert wrong.row(quick)["correct"] is False and wrong.row(quick)["median_ms"] > 0
    wrong.timing = type(wrong.timing)(1e-9, 1e-9, 1e-9, 3)
    assert best_peer([wrong, right]) is right
    line = next(line for line in table([wrong, right]).splitlines() if " wrong " in line)
    assert "wrong: " in line and "0.00" not in line  # no ratio that could be read as a win


def test_a_missing_or_failing_peer_is_a_row_without_a_time(
    quick: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    results = run_case(case(posttrain=product(), absent=missing, small=broken), quick)
    assert [result.correct for result in results] == [True, None, None]
    assert "not installed: No module named 'a_peer_that_nobody_has'" in results[1].reason
    assert results[2].reason == "failed: ValueError: size not supported"
    assert results[1].reason in capsys.readouterr().err and results[2].reason in table(results)
    write_rows(tmp_path / "product.csv", [result.row(quick) for result in results])
    rows = read_rows(tmp_path / "product.csv")
    assert [r["median_ms"] != "" for r in rows] == [True, False, False]
    assert [r["correct"] for r in rows] == ["true", "", ""]
    assert best_peer(results) is None


def test_another_setting_of_ours_is_no_peer(quick: Run) -> None:
    ours, other, eager = run_case(case(posttrain=product(), posttrain_other=product(), eager=product()), quick)
    other.timing = type(other.timing)(1e-9, 1e-9, 1e-9, 3)
    assert best_peer([ours, other, eager]) is eager and best_peer([ours, other]) is None
    wrong, peer = run_case(case(posttrain_other=product(1.01), posttrainer=product(1.01)), quick)
    assert wrong.ours_is_bad() and not peer.ours_is_bad()


def test_linear_kl_is_measured_with_both_types_of_logits(quick: Run) -> None:
    (only,) = bench_linear_kl.cases(CPU, quick=True)
    assert [result.correct for result in run_case(only, quick, {OURS, f"{OURS}_fp32_logits"})] == [True, True]


def test_the_scan_and_its_step_are_measured_with_all_gradients(quick: Run) -> None:
    forward, training, step = bench_ssd_scan.cases(CPU, quick=True)
    names = {"grad_" + name for name in ("x", "dt", "a", "b", "c", "d")}
    for case, outputs in ((forward, {"y"}), (training, {"y", *names}), (step, {"y", "last"})):
        results = run_case(case, quick, {OURS, "torch_chunks"})
        assert [result.correct for result in results] == [True, True]
        assert all(set(result.errors) == outputs for result in results)
    shape = bench_ssd_scan.Shape(8, 4096, 32, (32, 32, 32))
    of_x = 2 * 8 * 4096 * 32 * 64
    assert 4 * of_x < shape.bytes(2, backward=False) < 4.2 * of_x
    assert 11 * of_x < shape.bytes(2, backward=True) < 11.4 * of_x


def test_a_scan_of_any_size_is_measured_from_the_command_line(tmp_path: Path) -> None:
    sizes = [
        "--batch",
        "1",
        "--tokens",
        "21",
        "--heads",
        "4",
        "--groups",
        "2",
        "2",
        "4",
        "--head",
        "16",
        "--state",
        "16",
    ]
    script = [sys.executable, "scripts/bench_ssd_scan.py", *sizes, "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(script, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = read_rows(tmp_path / "ssd_scan.csv")
    assert {r["direction"] for r in rows if r["correct"] == "true" and r["implementation"] == OURS} == {
        "fwd",
        "fwd+bwd",
    }


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_tiles_of_the_scan_are_timed_where_they_are_right(tmp_path: Path) -> None:
    sizes = [
        "--batch",
        "1",
        "--tokens",
        "5",
        "--heads",
        "2",
        "--groups",
        "1",
        "2",
        "2",
        "--head",
        "16",
        "--state",
        "16",
    ]
    script = [sys.executable, "scripts/tune_ssd_scan.py", *sizes, "--tiles", "2", "--out", str(tmp_path)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(script, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    with (tmp_path / "tune_ssd_scan.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["pass"] for row in rows] == [*["forward"] * 2, *["backward"] * 2, "run", *["states"] * 2]
    assert all(row["verdict"] == "right" and float(row["ms"]) > 0 for row in rows)
    assert [row["default"] for row in rows] == ["True", "False", "True", "False", "True", "True", "False"]
    assert "fastest: forward" in done.stdout and "both" in done.stdout


def test_no_implementation_finds_what_another_wrote(quick: Run) -> None:
    (writes,) = [made for made in bench_decode_ops.cases(CPU, quick=True) if made.operator == "rotary_cache"]

    def idle(*given):
        scratch = [cache.clone() for cache in given[5:]]
        return bench_decode_ops.rotary_cache_reference(*given[:5], *scratch), *given[5:]

    made = {**writes.implementations, "idle": bench_decode_ops._rotating(idle, 1)}
    results = run_case(replace(writes, implementations=made), quick)
    assert [result.correct for result in results] == [True, True, False]


def test_peers_of_attention_agree_and_get_their_mask_before_the_call(
    quick: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [made for made in bench_decode_ops.cases(CPU, quick=True) if made.operator == "decode_attention"]
    results = [result for each in made for result in run_case(each, quick)]
    assert [result.reason for result in results] == [""] * 5
    peers = [(each, make) for each in made for name, make in each.implementations.items() if name != OURS]
    calls = [make(each.inputs())[0] for each, make in peers]
    monkeypatch.setattr(torch, "arange", None)  # nobody makes a mask without it
    assert len([call() for call in calls]) == 3


def test_relative_error_is_chunked_and_knows_zero() -> None:
    expected, output = torch.randn(7, 11), torch.randn(7, 11)
    whole = float((output.double() - expected).norm() / expected.double().norm())
    assert relative_error(output, expected, chunk=10) == pytest.approx(whole, rel=1e-9)
    assert relative_error(torch.ones(4), torch.zeros(4)) == 2.0
    assert relative_error(torch.zeros(4), torch.zeros(4)) == 0.0


def test_limits_come_from_the_ceilings() -> None:
    ceilings = Ceilings(copy_gb_s=1000.0, matmul_tflop_s=500.0)
    assert ceilings.gemm_ms(5e12) == pytest.approx(10.0)
    assert ceilings.bytes_ms(2e9) == pytest.approx(2.0)
    assert ceilings.roofline_ms(5e12, 2e9) == pytest.approx(10.0)
    measured = measure_ceilings(CPU).ceilings
    assert measured.copy_gb_s > 0 and measured.matmul_tflop_s > 0


def test_newest_takes_the_last_run_of_each_case_and_gpu() -> None:
    rows = [
        row(gpu="a", date="2026-01-01", median_ms="1"),
        row(gpu="a", date="2026-01-02", median_ms="2"),
        row(gpu="b", date="2026-01-01", median_ms="3"),
        row(gpu="a", shape="9x9", date="2025-01-01", median_ms="4"),
    ]
    assert [r["median_ms"] for r in newest(rows)] == ["2", "3", "4"]


def test_the_plot_is_drawn_from_the_csv_alone(tmp_path: Path) -> None:
    path = tmp_path / "product.csv"
    fields = {"dtype": "float32", "direction": "fwd", "gpu": "NVIDIA H200", "limit_ms": "0.5"}
    peers = [
        row(**fields, implementation=OURS, median_ms="1.0", peak_mib="5", correct="true"),
        row(**fields, implementation="eager", median_ms="2.0", peak_mib="9", correct="true"),
        row(**fields, implementation="quick", median_ms="0.1", correct="false"),
        row(**fields, implementation="absent"),
    ]
    write_rows(path, peers)
    assert plot.main(["--results", str(tmp_path), "--out", str(tmp_path / "plots")]) == 0
    image = tmp_path / "plots" / "bench_product.png"
    assert image.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and image.stat().st_size > 5000


def test_run_finds_the_modules_and_measures_them_quickly(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = [module.__name__.rpartition("bench_")[2] for module in run._modules()]
    assert {"linear_kl", "linear_logprob"} <= set(found)
    code = run.main(["--only", "linear_logprob", "--quick", "--out", str(tmp_path)])
    rows = read_rows(tmp_path / "linear_logprob.csv")
    assert code == 0 and {r["implementation"] for r in rows if r["correct"] == "true"} >= {OURS, "eager"}
    assert (tmp_path / "ceilings.csv").exists()
    assert "x best peer" in capsys.readouterr().out

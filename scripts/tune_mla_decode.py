"""Time the launch shapes of `mla_decode` on a GPU: every tile is checked first, wrong or failing ones are named.

    python scripts/tune_mla_decode.py --out FOLDER [--minutes 4] [--heads 16 32 128] [--widths 512+64 128+32]
    python scripts/tune_mla_decode.py --list                      # the tiles, without a GPU

Workers compile and check tiles side by side, each in a process of its own: one that fails, hangs or breaks its CUDA
context is left out and costs no other. Then the tiles are timed one by one as replays of a CUDA graph, on the cache of
`bench_mla_decode.py`. The table has the fastest tiles of each shape, the CSV all of them.
"""
# ruff: noqa: E402  (the checkout comes first on the path)

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch
from posttrain_kernels.mla_decode import mla_decode_reference
from posttrain_kernels.mla_decode.tiles import MULTIPROCESSORS, SHARED_MEMORY, Tile, choose_splits, choose_tile

from benchmarks.bench_mla_decode import SHAPES, Shape, caches
from benchmarks.ceilings import measure_ceilings
from benchmarks.timing import measure

TOLERANCE = 1e-2
WORKERS = 14
WORKER_SECONDS = 150.0
BROKEN = 3
"""A worker's exit code when its last tile broke the CUDA context: the tiles after it are not to blame."""
TILE_COLUMNS = ("heads", "slots", "warps", "stages", "slots_first", "tma", "gluon", "halves", "resident")
COLUMNS = ("shape", *TILE_COLUMNS, "splits", "ms", "gb_s", "tflop_s", "percent", "default")


def main() -> int:
    options = _arguments()
    shapes = [s for s in SHAPES if s.heads in options.heads and f"{s.rank}+{s.rope}" in options.widths]
    jobs = sorted({job for shape in shapes for job in _jobs(shape)}, key=str)
    if options.list:
        print(*(f"{width} H{heads} {_text(tile)}" for width, heads, tile in jobs), f"{len(jobs)} tiles", sep="\n")
        return 0
    if options.check is not None:
        return _check_jobs([jobs[index] for index in options.check], options.check)
    began = time.monotonic()
    verdicts = _check_in_workers(jobs, options)
    right = {job for job, verdict in zip(jobs, verdicts, strict=True) if verdict == "right"}
    for job, verdict in zip(jobs, verdicts, strict=True):
        if verdict != "right":
            print(f"LEFT OUT {job[0]} H{job[1]} {_text(job[2])}: {verdict}")
    print(f"{len(right)} of {len(jobs)} tiles compile and are right, {time.monotonic() - began:.0f} s", flush=True)
    rows = _time_all(shapes, right, began + 60 * options.minutes)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "tune_mla_decode.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    _print_table(rows, options.best)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tune"), help="folder of the CSV file")
    parser.add_argument("--minutes", type=float, default=4.5, help="no timing starts later than this after the start")
    parser.add_argument("--heads", type=int, nargs="+", default=[16, 32, 128])
    parser.add_argument("--widths", nargs="+", default=["512+64", "128+32"])
    parser.add_argument("--best", type=int, default=3, help="tiles of a shape in the table")
    parser.add_argument("--list", action="store_true", help="print the tiles and stop")
    parser.add_argument("--check", type=int, nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args()


def candidates(heads: int, rank: int, rope: int) -> Iterator[Tile]:
    """The tiles worth a try, by heads and padded widths, that fit in shared memory; the default is one of them."""
    width = _power_of_two(rank), _power_of_two(rope)
    block, few = min(32, _power_of_two(heads)), heads <= 32
    stages = (2, 3, 4) if rank > 256 else (2, 4)
    yield choose_tile(heads, rank)
    if rank > 256:
        yield from _fitting(Tile(64, 64, 8, 2, tma=True, gluon=True, halves=True), width)
    else:
        for most, slots, stage in product((64,) if few else (64, 128), (64, 128), (2, 3, 4, 6, 8)):
            yield from _fitting(Tile(most, slots, most // 16, stage, tma=True, gluon=True), width)
    for tma, stage in product((True, False), stages):
        if few:
            for slots, warps in ((64, 4), (64, 8), (128, 4), (128, 8)):
                yield from _fitting(Tile(block, slots, warps, stage, slots_first=True, tma=tma), width)
            for slots, warps in product((32, 64, 128), (4, 8)):
                yield from _fitting(Tile(block, slots, warps, stage, tma=tma), width)
        else:
            for most, slots, warps in product((64, 128), (64, 128), (4, 8)):
                yield from _fitting(Tile(most, slots, warps, stage, tma=tma), width)
            for slots in (64, 128):
                yield from _fitting(Tile(64, slots, slots // 16, stage, slots_first=True, tma=tma), width)


def _fitting(tile: Tile, width: tuple[int, int]) -> Iterator[Tile]:
    """The tile with as many resident programs as its memory and registers allow; none if it cannot fit."""
    # Accumulators in fp32 want half of the registers at most.
    accumulators = tile.heads * width[0] / (32 * tile.warps)
    memory = tile.shared_memory(2 * width[0], 2 * width[1])
    if accumulators > 128 or memory > SHARED_MEMORY:
        return
    registers = (2 if tile.heads == 64 and not tile.halves else 1) if tile.gluon else 65536 // (32 * tile.warps * 255)
    yield replace(tile, resident=max(1, min(SHARED_MEMORY // memory, registers)))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


Job = tuple[str, int, Tile]


def _jobs(shape: Shape) -> set[Job]:
    width = f"{shape.rank}+{shape.rope}"
    return {(width, shape.heads, tile) for tile in candidates(shape.heads, shape.rank, shape.rope)}


def _text(tile: Tile) -> str:
    """Short: heads x slots, warps, stages, g(luon), s(lots) or h(eads first), t(ma) or p(ointers), x programs."""
    flags = ("g" if tile.gluon else "s" if tile.slots_first else "h") + ("t" if tile.tma else "p")
    return f"{tile.heads}x{tile.slots} w{tile.warps} st{tile.stages} {flags} x{tile.resident}"


def _check_in_workers(jobs: list[Job], options: argparse.Namespace) -> list[str]:
    """A verdict for each job; a worker that stops early is started again behind the job that stopped it."""
    verdicts, deadline = ["no answer in time"] * len(jobs), time.monotonic() + WORKER_SECONDS
    pending = [list(range(n, len(jobs), WORKERS)) for n in range(min(WORKERS, len(jobs)))]
    running = {}
    given = ["--heads", *map(str, options.heads), "--widths", *options.widths]
    options.out.mkdir(parents=True, exist_ok=True)
    while (pending or running) and time.monotonic() < deadline:
        while pending:
            todo = pending.pop()
            log = options.out / f"check_{todo[0]}.log"
            command = [sys.executable, __file__, *given, "--check", *map(str, todo)]
            with log.open("w") as file:
                running[subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)] = (todo, log)
        for process in [process for process in running if process.poll() is not None]:
            todo, log = running.pop(process)
            left = _read(log, todo, verdicts)
            if left and process.returncode != BROKEN:
                verdicts[left.pop(0)] = f"stopped its process ({_last_line(log)})"
            pending += [left] if left else []
        time.sleep(0.2)
    for process, (todo, log) in running.items():
        process.kill()
        process.wait()
        _read(log, todo, verdicts)
    for log in options.out.glob("check_*.log"):
        log.unlink()
    return verdicts


def _read(log: Path, todo: list[int], verdicts: list[str]) -> list[int]:
    """Enter a worker's verdicts; what it left undone."""
    done = set()
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith('{"verdict"'):
            answer = json.loads(line)
            verdicts[answer["index"]] = answer["verdict"]
            done.add(answer["index"])
    return [index for index in todo if index not in done]


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:160] if lines else "no output"


def _check_jobs(jobs: list[Job], indices: list[int]) -> int:
    """A worker: one line of JSON a job; it stops where CUDA does."""
    for (width, heads, tile), index in zip(jobs, indices, strict=True):
        try:
            verdict = _verdict(heads, *map(int, width.split("+")), tile)
        except Exception as error:  # a tile that does not compile must not end the others
            verdict = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        print(json.dumps({"verdict": verdict, "index": index}), flush=True)
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return BROKEN
    return 0


def _verdict(heads: int, rank: int, rope: int, tile: Tile) -> str:
    """Right, or how wrong: odd lengths, short and empty rows, NaN outside each row's slots, one part and several."""
    from posttrain_kernels.mla_decode.launch import mla_decode_triton

    torch.manual_seed(0)
    capacity, length = 1056, torch.tensor([1001], device="cuda")
    start = torch.tensor([0, 1, 500, 938, 1000, 1001, 1040], device="cuda")
    slots = torch.arange(capacity, device="cuda")
    outside = ~((slots >= start[:, None]) & (slots < length))[..., None]
    latent, k_rope = (
        torch.randn(len(start), capacity, width, device="cuda").bfloat16().masked_fill_(outside, float("nan"))
        for width in (rank, rope)
    )
    q_latent, q_rope = (torch.randn(len(start), heads, width, device="cuda").bfloat16() for width in (rank, rope))
    given, scale = (q_latent, q_rope, latent, k_rope), 1.5 * (rank + rope) ** -0.5
    expected = mla_decode_reference(*(x.double() for x in given), start, length, scale)
    for splits in (1, 3, 16):
        out = mla_decode_triton(*given, start, length, scale, splits=splits, tile=tile)
        again = mla_decode_triton(*given, start, length, scale, splits=splits, tile=tile)
        error = float((out.double() - expected).norm() / expected.norm())
        if not error < TOLERANCE:
            return f"WRONG by {error:.1e} with {splits} splits"
        if not torch.equal(out, again):
            return f"NOT THE SAME twice with {splits} splits"
    return "right"


def _time_all(shapes: list[Shape], right: set[Job], deadline: float) -> list[dict[str, object]]:
    device = torch.device("cuda")
    ceilings = measure_ceilings(device).ceilings
    print(f"copy {ceilings.copy_gb_s:.0f} GB/s, matmul {ceilings.matmul_tflop_s:.0f} TFLOP/s, {_card()}", flush=True)
    rows, skipped = [], 0
    for shape in shapes:
        limit, default = shape.limit_ms(ceilings), choose_tile(shape.heads, shape.rank)
        fastest = float("inf")
        for _, _, tile in sorted((job for job in _jobs(shape) if job in right), key=lambda job: job[2] != default):
            hopeless = False
            for splits in _splits(shape, tile):
                if hopeless or time.monotonic() > deadline:
                    skipped += not hopeless
                    continue
                ms = _time(shape, tile, splits, fastest)
                hopeless, fastest = ms > 1.25 * fastest, min(ms, fastest)
                rates = {"gb_s": shape.bytes() / ms / 1e6, "tflop_s": shape.flops() / ms / 1e9}
                rows.append(
                    {"shape": str(shape), **asdict(tile), "splits": splits, "ms": ms, **rates}
                    | {"percent": 100 * limit / ms, "default": tile == default and splits == _default(shape, tile)}
                )
    if skipped:
        print(f"TIME IS UP: {skipped} timings left out")
    return rows


def _card() -> str:
    return torch.cuda.get_device_name()


def _default(shape: Shape, tile: Tile) -> int:
    return choose_splits(shape.batch * -(-shape.heads // tile.heads), shape.context, tile)


def _splits(shape: Shape, tile: Tile) -> list[int]:
    """What would be chosen, and those that give one, two or three whole waves."""
    programs = shape.batch * -(-shape.heads // tile.heads)
    waves = (waves * MULTIPROCESSORS * tile.resident // programs for waves in (1, 2, 3))
    most = min(256, shape.context // tile.slots)
    return list(dict.fromkeys([_default(shape, tile), *(max(1, min(most, splits)) for splits in waves)]))


def _time(shape: Shape, tile: Tile, splits: int, fastest: float) -> float:
    """ms a call; a tile twice as slow as the fastest so far is not measured longer."""
    from posttrain_kernels.mla_decode.launch import mla_decode_triton

    device = torch.device("cuda")
    latent, k_rope = caches(shape.rows, shape.context, shape.rank, shape.rope, device)
    q_latent, q_rope = (
        torch.randn(shape.batch, shape.heads, width, device=device).bfloat16() for width in (shape.rank, shape.rope)
    )
    start = torch.zeros(shape.batch, dtype=torch.long, device=device)
    length, scale, calls = torch.tensor([shape.context], device=device), (shape.rank + shape.rope) ** -0.5, [0]

    def run() -> None:
        first = calls[0] % (shape.rows // shape.batch) * shape.batch
        calls[0] += 1
        given = (q_latent, q_rope, latent[first : first + shape.batch], k_rope[first : first + shape.batch])
        mla_decode_triton(*given, start, length, scale, splits=splits, tile=tile)

    graph_calls = 16 if shape.batch < 16 else 4 if shape.batch < 64 else 1
    options = dict(flush=False, graph_calls=graph_calls, min_calls=3)
    quick = measure(run, device, warmup_ms=2, rep_ms=5, **options).median_ms
    if quick > 1.5 * fastest:
        return quick
    return measure(run, device, warmup_ms=5, rep_ms=40, **options).median_ms


def _print_table(rows: list[dict[str, object]], best: int) -> None:
    """The fastest of each shape, and the default where it is none of them (marked *)."""
    print(f"{'shape':28}{'tile':28}{'splits':>7}{'ms':>9}{'GB/s':>7}{'TFLOP/s':>9}{'% limit':>9}")
    for shape in dict.fromkeys(row["shape"] for row in rows):
        ranked = sorted((row for row in rows if row["shape"] == shape), key=lambda row: row["ms"])
        for row in ranked[:best] + [row for row in ranked[best:] if row["default"]]:
            tile = _text(Tile(**{name: row[name] for name in TILE_COLUMNS})) + (" *" if row["default"] else "")
            rates = f"{row['gb_s']:7.0f}{row['tflop_s']:9.1f}{row['percent']:9.1f}"
            print(f"{shape:28}{tile:28}{row['splits']:7d}{row['ms']:9.4f}{rates}")


if __name__ == "__main__":
    sys.exit(main())

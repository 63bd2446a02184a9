"""How long simulating takes, printed with where the time goes: pytest -m benchmark -s tests/benchmarks.

CPU seconds of a single core, compiled loops cached on disk. A step counts from a loaded trace to the attribution, with
one routing sample; a run is all that `moesim run` does. The least of several runs counts, for the first may compile and
others may be disturbed. What is asserted is asked of the project; what is printed should lie well below.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.benchmark

HERE = Path(__file__).parent
SCENARIOS = HERE.parent.parent / "scenarios"
LARGE = SCENARIOS / "deepseek-v3-2048xh800.yaml"
PHASES = ("build", "simulate", "attribute")
RUNS = 3
# One expert group of 64 ranks holds the whole of DeepSeek-V3: 61 layers, 256 experts, 4096 tokens a rank.
ONE_GROUP = (
    "cluster.nodes=8",
    "parallelism={data: 64, expert: 64}",
    "workload.global_batch=64",
    "workload.recompute=none",
    "workload.gradient_clipping=null",
    "dispatch={algorithm: direct, deduplicate: per_rank, dtype: fp8}",
    "compute.profile=roofline",
)


def measured(path: Path, *changes: str, title: str, repeat: int = RUNS) -> dict[str, Any]:
    """Measure a step and print the least of each phase: the first run may compile, the others may be disturbed."""
    command = [sys.executable, str(HERE / "measure_step.py"), str(path), *changes]
    runs = [
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(repeat)
    ]
    found: dict[str, Any] = runs[-1]
    seconds = {phase: min(run["seconds"][phase] for run in runs) for phase in found["seconds"]}
    found["least"] = seconds
    found["total"] = sum(seconds[phase] for phase in PHASES)
    print(f"\n{title}: {found['total']:.2f} s of CPU, {found['peak_bytes'] / 2**30:.2f} GiB at most")
    print("  " + ", ".join(f"{phase} {value:.2f} s" for phase, value in seconds.items()))
    print(f"  simulated step {found['step_s']:.3f} s, {found['rank_spans'] / 1e6:.1f} million spans of ranks")
    for name, calls, own in found["profile"]:
        print(f"    {own:7.3f} s {calls:9d} x {name}")
    assert sum(found["parts_s"].values()) == pytest.approx(found["step_s"], rel=1e-9)
    return found


def run_seconds(scenario: str, *changes: str, out_dir: Path, title: str) -> float:
    """CPU seconds of a whole `moesim run`, start of Python and report included; its peak memory is printed beside."""
    command = [sys.executable, "-m", "moesim", "run", str(SCENARIOS / f"{scenario}.yaml")]
    command += [f"--set={change}" for change in changes]
    seconds, peak_bytes = [], []
    for number in range(RUNS):
        process = subprocess.Popen([*command, "--quiet", "--out", str(out_dir / str(number))])
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        seconds.append(usage.ru_utime + usage.ru_stime)
        peak_bytes.append(usage.ru_maxrss * 1024)
    each = ", ".join(f"{second:.2f}" for second in seconds)
    print(f"\n{title}: {min(seconds):.2f} s of CPU ({each}), {max(peak_bytes) / 2**30:.2f} GiB at most")
    return min(seconds)


def test_step_of_2048_gpus_with_ports() -> None:
    whole = measured(LARGE, title="DeepSeek-V3 on 2048 GPUs, 120 micro-batches, ports")
    half = measured(LARGE, "workload.global_batch=7680", title="the same, 60 micro-batches")
    assert whole["total"] < 20.0
    assert whole["peak_bytes"] < 2 * 2**30
    grown = [phase for phase in PHASES if phase != "build"]
    times, half_times = (sum(found["least"][phase] for phase in grown) for found in (whole, half))
    print(f"  simulation and attribution grow by {times / half_times:.2f} for twice the micro-batches")
    assert times < 2.5 * half_times


def test_step_of_2048_gpus_with_fluid() -> None:
    found = measured(LARGE, "network.model=fluid", title="DeepSeek-V3 on 2048 GPUs, fluid")
    assert found["total"] < 150.0
    assert found["least"]["simulate again, profiled"] < 30.0  # every transfer has been solved before


def test_step_of_64_gpus() -> None:
    found = measured(
        SCENARIOS / "deepseek-moe-16b.yaml",
        "routing={kind: uniform, router: {kind: deepseek_moe}}",
        "workload.global_batch=64",
        title="DeepSeekMoE-16B on 64 GPUs, one micro-batch",
        repeat=2 * RUNS,  # short, and so the more disturbed
    )
    assert found["total"] < 1.0


def test_step_of_one_large_expert_group() -> None:
    found = measured(LARGE, *ONE_GROUP, title="DeepSeek-V3 on one group of 64 GPUs")
    assert found["total"] < 4.0


def test_whole_runs(tmp_path: Path) -> None:
    v3 = run_seconds("deepseek-v3-2048xh800", out_dir=tmp_path / "v3", title="moesim run of DeepSeek-V3 on 2048 GPUs")
    v2 = run_seconds("deepseek-v2-h800", out_dir=tmp_path / "v2", title="moesim run of DeepSeek-V2 on 1024 GPUs")
    small = run_seconds(
        "quickstart",
        "routing={kind: uniform, router: {kind: deepseek_v2, device_limit: 3}}",  # as if its router were trained
        out_dir=tmp_path / "quickstart",
        title="moesim run of the quickstart, 24 routing samples",
    )
    assert v3 < 40.0
    assert v2 < 60.0
    assert small < 6.0


def test_help_is_instant() -> None:
    seconds = []
    for _ in range(RUNS):
        before = os.times()
        subprocess.run([sys.executable, "-m", "moesim", "--help"], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        seconds.append(after.children_user - before.children_user + after.children_system - before.children_system)
    print(f"\nmoesim --help: {min(seconds):.2f} s of CPU")
    assert min(seconds) < 0.5

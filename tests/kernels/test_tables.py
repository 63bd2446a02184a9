"""Laws of GPUs known from published tables, and of making their profiles from a package with known content."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.errors import UserError
from moesim.kernels import (
    Attention,
    CalibratedModel,
    Gemm,
    GroupedGemm,
    MemoryBound,
    kernel_model,
    load_profile,
)
from moesim.kernels.clock_laws import KIND_POWER, STEEPNESS, threshold_of
from moesim.kernels.families import MEMORY_KINDS
from moesim.kernels.power import LEAST_EXPONENT
from moesim.kernels.profile import load_profile_file
from moesim.kernels.tables import TABLE_GPUS, from_tables
from moesim.kernels.tables.package import LICENCE, Package, Table
from moesim.kernels.tables.rows import cast_seconds
from moesim.kernels.tabulated import TabulatedModel
from moesim.scenario import gpu_spec

ROOT = Path(__file__).parent.parent.parent
HEADS: dict[str, Any] = {"heads": 32, "kv_heads": 8, "head_dim": 128, "value_dim": 128}
SIDES: dict[str, Any] = {"k": 4096, "n": 8192}


@pytest.fixture(params=TABLE_GPUS)
def model(request: pytest.FixtureRequest) -> TabulatedModel:
    found = kernel_model(request.param)
    assert isinstance(found, TabulatedModel)
    return found


def kernels_of(model: TabulatedModel) -> Iterator[Any]:
    m = np.array([512.0, 2048.0, 8192.0, 32768.0])
    dtypes = ("bf16", "fp8") if "fp8" in model.target.peak_flops else ("bf16",)
    for dtype in dtypes:
        yield from (Gemm(m=m, dtype=dtype, direction=direction, **SIDES) for direction in ("forward", "dgrad", "wgrad"))
        yield GroupedGemm(rows_per_expert=m[:, None] / 8 * np.ones(8), dtype=dtype, k=2048, n=4096)
    yield from (Attention(batch=1, sequence=m, direction=d, **HEADS) for d in ("forward", "backward"))
    yield MemoryBound(kind="rms_norm", bytes=m * 4096 * 4)


def test_more_work_takes_longer_and_nothing_passes_the_peak_or_the_bandwidth(model: TabulatedModel) -> None:
    for one in (model, model.at_load(0.0)):
        for kernel in kernels_of(model):
            seconds = np.asarray(one.seconds(kernel).seconds)
            assert (np.diff(seconds) > 0).all()
            # A library may pass the data sheet's peak by little: clocks rise above the one that it is quoted at.
            peak = model.target.peak_flops[getattr(kernel, "dtype", "bf16")]
            assert (np.asarray(kernel.flops) / seconds < 1.05 * peak).all()
            if isinstance(kernel, MemoryBound):
                assert (kernel.moved_bytes / seconds)[-1] < model.target.memory_bandwidth


def test_what_no_table_has_says_that_it_is_scaled(model: TabulatedModel) -> None:
    assert model.seconds(Gemm(m=4096, **SIDES)).source in ("measured", "interpolated")
    assert model.seconds(Gemm(m=4096, direction="wgrad", **SIDES)).source == "scaled"
    assert model.seconds(GroupedGemm(rows_per_expert=[512] * 8, k=2048, n=4096)).source == "scaled"
    assert model.seconds(MemoryBound(kind="copy", bytes=1e9)).source == "scaled"
    backward = Attention(batch=1, sequence=4096, direction="backward", **HEADS)
    assert model.seconds(backward).source == "scaled"


def test_gradients_take_as_much_longer_than_forward_as_where_they_were_measured(model: TabulatedModel) -> None:
    base = load_profile("h200")
    assert isinstance(base, CalibratedModel)
    free = base.at_benchmark_clock()
    forward, wgrad = Gemm(m=8192, k=4096, n=4096), Gemm(m=4096, k=4096, n=8192, direction="wgrad")  # of the same sides
    ratios = [float(one.seconds(wgrad).seconds) / float(one.seconds(forward).seconds) for one in (model, free)]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-9)


def test_a_loaded_step_is_slower_and_only_an_unknown_law_has_an_error(model: TabulatedModel) -> None:
    peak = model.target.peak_flops["bf16"]
    kernel = Gemm(m=8192, k=8192, n=8192)
    idle, half, full = (model.at_load(share * peak) for share in (0.0, 0.5, 0.8))
    seconds = [float(one.seconds(kernel).seconds) for one in (idle, half, full)]
    assert seconds[0] <= seconds[1] <= seconds[2]
    assert (seconds[0] < seconds[2]) == (model.law.cap.slope > 0.0)
    assert idle.clock_error == 0.0
    assert (full.clock_error == 0.0) == (KIND_POWER[model.profile.name].sustained is not None)


def test_a_law_with_a_sustained_rate_reaches_it() -> None:
    model, kind = load_profile("b200"), KIND_POWER["b200"]
    assert kind.sustained is not None
    kernel = Gemm(m=np.array([8192, 16384]), k=8192, n=16384)
    rates = kernel.flops / np.asarray(model.seconds(kernel).seconds)
    assert rates == pytest.approx(kind.sustained, rel=0.08)


def test_thresholds_per_watt_carry_from_kind_to_kind() -> None:
    """From the two measured GPUs per watt the sustained rate of B200, and from B200 that of a GB300 held to 500 W
    (about 617 TFLOP/s, github:facebookexperimental/triton pull request 2023), which is in no choice.
    """
    b200 = KIND_POWER["b200"]
    assert b200.short is not None and b200.sustained is not None
    for name in ("h100", "h200"):
        rate = _sustained(b200.short, threshold_of(KIND_POWER[name]) / KIND_POWER[name].watts * b200.watts)
        assert rate == pytest.approx(b200.sustained, rel=0.1)
    short = KIND_SHORT["gb300"]
    assert _sustained(short, threshold_of(b200) / b200.watts * 500.0) == pytest.approx(617e12, rel=0.08)


KIND_SHORT = {"gb300": 1.891e15}  # of large GEMMs in the tables, FLOP/s


def _sustained(short: float, threshold: float) -> float:
    return float(short * np.exp(-LEAST_EXPONENT * STEEPNESS * max(short / threshold - 1.0, 0.0)))


def test_kernels_that_the_sms_limit_follow_them_and_others_the_bandwidth() -> None:
    """What each kind says is what the two measured GPUs, of the same SMs, tell; rates stay below the bandwidth."""
    h100, other = load_profile("h100"), load_profile("h200").at_benchmark_clock()
    wider = np.log(gpu_spec("h200").memory_bandwidth / gpu_spec("h100").memory_bandwidth)
    faster: dict[str, list[float]] = {}
    for row in h100.profile.family("memory_bound"):
        kernel = MemoryBound(row["kind"], row["bytes"], width=row["width"])
        if row["p50"] >= 100e-6 and other.has(kernel):  # type: ignore[union-attr]
            faster.setdefault(row["kind"], []).append(np.log(row["p50"] / float(other.seconds(kernel).seconds)) / wider)
    assert len(faster) >= 30
    for kind, found in faster.items():
        median = float(np.clip(np.median(found), 0.0, 1.0))
        assert median == pytest.approx(MEMORY_KINDS[kind].bandwidth, abs=0.13), kind
    h200, b200 = load_profile("h200"), load_profile("b200")
    assert isinstance(b200, TabulatedModel) and b200.profile.tables is not None
    share = b200.profile.tables["peak_shares"]["memory"]
    sms = gpu_spec("b200").sm_count * gpu_spec("b200").clock_hz / gpu_spec("h200").sm_count / gpu_spec("h200").clock_hz
    zeros, copies = (
        [float(m.seconds(MemoryBound(kind, 4e9)).seconds) for m in (h200, b200)] for kind in ("zero", "copy")
    )
    assert zeros[0] / zeros[1] == pytest.approx(sms, rel=0.1)
    assert copies[0] / copies[1] == pytest.approx(7.7 / 4.8 * share, rel=0.03)
    for kind in MEMORY_KINDS:
        rate = 4e9 / float(load_profile("l40s").seconds(MemoryBound(kind, 4e9)).seconds)
        assert rate < 1.3 * gpu_spec("l40s").memory_bandwidth


def test_the_cast_of_a_tables_rows_is_found_and_taken_off() -> None:
    """Rows made of a launch, FLOPs, outputs, weights and a cast of the activations, with noise."""
    rng = np.random.default_rng(0)
    m, n, k = (2 ** rng.integers(9, 15, 600) for _ in range(3))
    cast = 2.5625 / 4e12
    seconds = 5e-6 + 2.0 * m * n * k / 5e15 + cast * m * k + 2.0 * m * n / 7e12 + 0.5625 * n * k / 7e12
    latency = 1e3 * seconds * np.exp(rng.normal(0.0, 0.02, 600))
    columns = {"m": m, "n": n, "k": k, "latency": latency, "gemm_dtype": np.full(600, "nvfp4")}
    table = Table(columns, framework="any", version="1", name="gemm_perf")
    assert cast_seconds(table, "nvfp4") == pytest.approx(cast, rel=0.1)
    assert cast_seconds(table, "fp8_block") == 0.0, "no rows of it"


def test_every_row_names_a_table_and_the_notice_names_the_licence(model: TabulatedModel) -> None:
    facts, notice = model.profile.tables, (ROOT / "NOTICE").read_text()
    assert facts is not None and facts["licence"] == LICENCE and "Apache License" in notice
    assert facts["package"].split()[0] in notice
    for row in model.profile.rows:
        assert model.profile.sessions[row["session"]]["table"]
    for family in ("gemm/bf16", "attention", "collective", "decode"):
        assert facts["families"][family]["kept"] <= facts["families"][family]["rows_of_table"]


def test_published_runs_that_are_in_no_choice_are_met() -> None:
    """Copies of B200 (CUDA's own sample finds over 6,000 GB/s, read and written: newmind.ai/journal/18), and, of the
    best of thousands of shapes each, which favours the best (maximum achievable matmul FLOPS of
    github:stas00/ml-engineering, 2026), TFLOP/s in short runs.
    """
    copied = 4e9 / float(load_profile("b200").seconds(MemoryBound("copy", 4e9)).seconds)
    assert copied == pytest.approx(6.1e12, rel=0.04)
    best = {
        ("h100", "bf16", 2048, 2048, 13312): 794.5, ("h100", "fp8", 1024, 9216, 14336): 1402.6,
        ("h200", "fp8", 1280, 4096, 12032): 1453.4, ("b200", "bf16", 1792, 16128, 3072): 1745.0,
        ("b300", "bf16", 12288, 18432, 1024): 1769.0, ("b200", "fp8", 15360, 4096, 3072): 3432.5,
        ("b300", "fp8", 3072, 6144, 7168): 3353.3, ("gb200", "bf16", 4096, 9728, 2048): 1822.0,
        ("gb200", "fp8", 19456, 5120, 1536): 3615.6, ("a100", "bf16", 1024, 10240, 5120): 271.2,
    }  # fmt: skip
    for (gpu, dtype, m, n, k), rate in best.items():
        kernel, least = Gemm(m, k, n, dtype=dtype), 0.95 if gpu in ("h100", "h200") else 0.79
        seconds = float(kernel_model(gpu, regime="short").seconds(kernel).seconds)
        assert least < float(kernel.flops) / seconds / (1e12 * rate) < 1.05, (gpu, dtype)


def test_a_gpu_of_another_maker_reaches_what_its_gemms_were_measured_to_reach() -> None:
    kernel = Gemm(10240, 8192, 15360)
    rate = float(kernel.flops) / float(kernel_model("mi300x", regime="short").seconds(kernel).seconds)
    assert rate == pytest.approx(668.4e12, rel=0.05)
    assert kernel_model("mi300x").seconds(kernel).source == "scaled"


def test_a_gpu_like_one_of_the_tables_is_scaled_from_it() -> None:
    a100, a800 = kernel_model("a100"), kernel_model("a800")
    kernel = Gemm(m=4096, **SIDES)
    assert a800.seconds(kernel).seconds == pytest.approx(float(a100.seconds(kernel).seconds), rel=1e-9)
    assert a800.seconds(kernel).source == "scaled"


BIAS, QUANTISATION = -0.1, 3e-6  # log of table over own seconds; seconds of each of two kernels


def write(path: Path, columns: dict[str, list[Any]]) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True)
    parquet.write_table(pyarrow.table(columns), path)


def write_gpu(data: Path, model: CalibratedModel) -> None:
    """Tables of a GPU that does what `model` does: faster by BIAS, FP8 with quantisation on top."""
    free = model.at_benchmark_clock()
    shapes = [(m, n, k) for m in (256, 1024, 4096, 8192) for n in (512, 2048, 8192) for k in (512, 2048, 4096, 8192)]
    rows = []
    for dtype, name in (("bf16", "bfloat16"), ("fp8", "fp8")):
        for m, n, k in shapes:
            seconds = float(free.seconds(Gemm(m=m, n=n, k=k, dtype=dtype)).seconds) * np.exp(BIAS)
            rows.append((name, m, n, k, 1e3 * (seconds + (2 * QUANTISATION if dtype == "fp8" else 0.0))))
    names = ("gemm_dtype", "m", "n", "k", "latency")
    gemms = {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    write(data / "gemm/trtllm/1.3.0rc20/gemm_perf.parquet", gemms)
    write(data / "gemm/trtllm/1.0.0/gemm_perf.parquet", gemms | {"latency": [9.0] * len(rows)})  # older: not read
    for name in ("computescale_perf", "scale_matrix_perf"):
        sides = sorted({(m, k) for m, _, k in shapes})
        quantise = {
            "m": [m for m, _ in sides],
            "k": [k for _, k in sides],
            "latency": [1e3 * QUANTISATION] * len(sides),
        }
        write(data / f"quantize/trtllm/{name[:5]}/{name}.parquet", quantise)
    prompts = [(b, s, h) for b in (1, 2, 4, 8) for s in (512, 1024, 2048, 4096) for h in (16, 32)]
    own = [float(free.seconds(Attention(batch=b, sequence=s, **HEADS | {"heads": h})).seconds) for b, s, h in prompts]
    attention = {
        "batch_size": [b for b, _, _ in prompts], "isl": [s for _, s, _ in prompts],
        "num_heads": [h for *_, h in prompts],
    }  # fmt: skip
    constants = {"num_key_value_heads": 8, "head_dim": 128, "attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16"}
    attention |= {name: [value] * len(prompts) for name, value in (constants | {"step": 0}).items()}
    slow = attention | {"latency": [2e3 * seconds for seconds in own]}
    write(data / "attention/vllm/1/context_attention_perf.parquet", attention | {"latency": [1e3 * s for s in own]})
    write(data / "attention/sglang/1/context_attention_perf.parquet", slow)
    mla = {name: attention[name] for name in ("batch_size", "isl", "num_heads", "kv_cache_dtype")}
    wide = [Attention(batch=b, sequence=s, heads=h, kv_heads=h, head_dim=192, value_dim=128) for b, s, h in prompts]
    mla |= {"mla_dtype": ["bfloat16"] * len(prompts), "latency": [1e3 * float(free.seconds(w).seconds) for w in wide]}
    write(data / "mla/trtllm/1/context_mla_perf.parquet", mla)
    calls = [row for row in model.collectives if row["kind"] == "all_reduce"]
    nccl = {"op_name": ["all_reduce"] * len(calls), "nccl_dtype": ["half"] * len(calls)}
    sizes = {"num_gpus": [2] * len(calls), "message_size": [row["bytes"] // 2 for row in calls]}
    write(data / "comm/nccl/2.29.2/nccl_perf.parquet", nccl | sizes | {"latency": [1e3 * r["p50"] for r in calls]})


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    for gpu, name in (("h100", "h100_sxm"), ("h200", "h200_sxm"), ("h200", "b200_sxm")):
        model = load_profile(gpu)
        assert isinstance(model, CalibratedModel)
        write_gpu(folder / "systems/data" / name, model)
    return folder


def test_a_gpu_whose_tables_are_those_of_h200_gets_the_kernels_of_h200(package: Path) -> None:
    profile = from_tables("b200", folder=package, models=load_profile, rates=gpu_spec)
    assert profile.tables is not None
    found = profile.tables["families"]
    assert [found["gemm/bf16"]["kept"], found["gemm/fp8"]["kept"], found["attention"]["kept"]] == [48, 48, 32]
    h200 = load_profile("h200")
    assert isinstance(h200, CalibratedModel)
    free = h200.at_benchmark_clock()
    for row in (row for row in profile.rows if row["family"] in ("gemm", "gemm_fp8")):
        own = free.seconds(Gemm(m=row["m"], k=row["k"], n=row["n"], dtype=row["dtype"])).seconds
        assert row["p50"] == pytest.approx(float(own), rel=0.02)  # neither the bias nor the quantisation is left
    shares = profile.tables["peak_shares"]
    for dtype, share in shares.items():
        ratio = gpu_spec("h200").peak_flops[dtype] / gpu_spec("b200").peak_flops[dtype]
        assert share == pytest.approx(ratio, rel=0.02)


def test_a_missing_package_and_unknown_gpus_are_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pip install 'moesim\[tables\]'"):
        Package.found(tmp_path)
    with pytest.raises(UserError, match="no tables of 'h20'; there are tables of: a100"):
        from_tables("h20", folder=tmp_path, models=load_profile, rates=gpu_spec)


def test_a_damaged_profile_of_tables_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "b200.json"
    path.write_text('{"schema_version": 1, "name": "b200", "sessions": [], "rows": [], "tables": {"base": "h200"}}')
    with pytest.raises(UserError, match="damaged tables"):
        load_profile_file(path)

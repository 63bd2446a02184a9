"""FP8 training casts what its GEMMs read, in every phase, and bf16 training casts nothing."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from moesim.kernels.families import MemoryBound
from moesim.kernels.loading import kernel_model
from moesim.program.fp8_casts import ALONG_SHARE, BOTH_WAYS_SHARE, TURNING_SHARE, FusedCasts, fp8_casts
from moesim.program.gemms import column_parallel, projection, row_parallel
from moesim.program.networks import dense_ffn_part
from moesim.program.operations import Operation
from moesim.program.sizes import Step
from moesim.program.writer import KernelWriter
from moesim.results.spans import Part, Phase
from moesim.scenario import load_scenario
from moesim.strict_json import parse_json

DATA = Path(__file__).parent.parent / "data"
MODEL = load_scenario("scenarios/uniform-dropless.yaml").model
TOKENS, K, N = 65536, 2048, 4096


def writer(dtype: str) -> KernelWriter:
    return KernelWriter(kernel_model("h100", profile="roofline"), dtype=dtype, part=Part.DENSE_FFN)


def step() -> Step:
    return Step(model=MODEL, batch=16, sequence=4096, quantise=False, remote=False)


def casts(operations: list[Operation]) -> list[Operation]:
    return [each for each in operations if ".cast" in each.label.name or ".turn" in each.label.name]


def seconds(operations: list[Operation]) -> float:
    return float(sum(each.seconds_MSR.max() for each in operations if each.seconds_MSR is not None))


def test_bf16_casts_nothing() -> None:
    for passes in (projection(writer("bf16"), "p", m=TOKENS, k=K, n=N), dense_ffn_part(writer("bf16"), step())):
        assert casts([*passes[0], *passes[1]]) == []


def test_a_gemm_that_stays_wide_is_not_cast() -> None:
    passes = projection(writer("fp8"), "p", m=TOKENS, k=K, n=N, dtype="bf16")
    assert casts([*passes[0], *passes[1]]) == []


@pytest.mark.parametrize("product", [column_parallel, row_parallel])
def test_every_phase_has_its_casts_before_its_gemm(product) -> None:
    forward, backward = product(writer("fp8"), "p", step(), k=K, n=N)
    assert [each.label.phase for each in forward] == [Phase.FORWARD] * 2
    assert [each.label.phase for each in backward] == [Phase.INPUT_GRADIENT] * 2 + [Phase.WEIGHT_GRADIENT] * 2
    assert casts(forward) == forward[:1]
    assert casts(backward) == [backward[0], backward[2]]


def test_casts_move_their_bytes() -> None:
    """At 3.35 TB/s: 2 + 1 bytes a value along rows, 2 + 2 both ways, 1 + 1 turned, the last two slower as measured."""
    w, values = writer("fp8"), TOKENS * K
    plain = seconds([w.moved("plain", "elementwise", bytes_=float(values))])
    found = fp8_casts(w, "p", inputs=values, outputs=values)
    assert seconds(found.forward) == pytest.approx(3 / ALONG_SHARE * plain, rel=0.02)
    assert seconds(found.input_gradient) == pytest.approx(4 / BOTH_WAYS_SHARE * plain, rel=0.02)
    assert seconds(found.weight_gradient) == pytest.approx(2 / TURNING_SHARE * plain, rel=0.02)


@pytest.mark.parametrize("done", ["input_is_fp8", "gradient_is_fp8", "gradient_is_turned"])
def test_what_a_kernel_before_did_is_not_done_again(done: str) -> None:
    w = writer("fp8")
    whole = fp8_casts(w, "p", inputs=TOKENS * K, outputs=TOKENS * N)
    fused: FusedCasts = {done: True}  # type: ignore[misc]
    less = fp8_casts(w, "p", inputs=TOKENS * K, outputs=TOKENS * N, **fused)
    assert seconds([op for part in less for op in part]) < seconds([op for part in whole for op in part])


def test_the_shares_are_those_of_measured_kernels() -> None:
    """Rows of `moesim calibrate --families fp8` on an H100 from 100 MB on, beside the profile's elementwise kernel."""
    rows = parse_json(gzip.decompress((DATA / "fp8_h100.json.gz").read_bytes()))["rows"]
    model = kernel_model("h100")

    def share(kind: str) -> float:
        found = [row for row in rows if row.get("kind") == kind and row["bytes"] >= 1e8]
        assert len(found) >= 5
        return float(
            np.median([model.seconds(MemoryBound("elementwise", row["bytes"])).seconds / row["p50"] for row in found])
        )

    assert share("quantise_both") == pytest.approx(BOTH_WAYS_SHARE, rel=0.02)
    assert share("transpose_fp8") == pytest.approx(TURNING_SHARE, rel=0.02)
    for kind in ("quantise_rows", "swiglu_quantise", "quantise_weight"):
        assert share(kind) == pytest.approx(ALONG_SHARE, rel=0.02)

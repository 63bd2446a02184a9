"""FP8 training casts what its GEMMs read, in every phase, and bf16 training casts nothing."""

import pytest

from moesim.kernels.loading import kernel_model
from moesim.network import build_fabric
from moesim.program import build_program
from moesim.program.gemms import FusedCasts, column_parallel, fp8_casts, projection, row_parallel, weight_casts
from moesim.program.networks import dense_ffn_part
from moesim.program.operations import Kind, Operation
from moesim.program.outside_layers import optimizer_block
from moesim.program.sizes import Step
from moesim.program.writer import KernelWriter
from moesim.results.spans import Part, Phase
from moesim.run import draw_samples, obtain_trace
from moesim.scenario import load_scenario

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
    passes = projection(writer("fp8_block"), "p", m=TOKENS, k=K, n=N, dtype="bf16")
    assert casts([*passes[0], *passes[1]]) == []


@pytest.mark.parametrize("gemms", [column_parallel, row_parallel])
def test_every_phase_has_its_casts_before_its_gemm(gemms) -> None:
    forward, backward = gemms(writer("fp8_block"), "p", step(), k=K, n=N)
    assert [each.label.phase for each in forward] == [Phase.FORWARD] * 2
    assert [each.label.phase for each in backward] == [Phase.INPUT_GRADIENT] * 2 + [Phase.WEIGHT_GRADIENT] * 2
    assert casts(forward) == forward[:1]
    assert casts(backward) == [backward[0], backward[2]]


# Bytes a value: forward, before the input's gradient, before the weight's.
MOVED = {
    "fp8_block": (3 + 4 / 128, 4 + 8 / 128, 2 + 8 / 128),
    "fp8": (2 + 4, 2 + 4, 0),
    "mxfp8": (4 + 2 / 32, 4 + 2 / 32, 0),
    "nvfp4": (2 + 2 + 2 * (0.5 + 1 / 16), 2 + 2 + 2 * (0.5 + 1 / 16), 0),
}


@pytest.mark.parametrize("dtype", MOVED)
def test_casts_move_their_bytes(dtype: str) -> None:
    """On the roofline, where every kind reaches the same bandwidth."""
    w, values = writer(dtype), TOKENS * K
    plain = seconds([w.moved("plain", "elementwise", bytes_=float(values))])
    for operations, bytes_each in zip(fp8_casts(w, "p", inputs=values, outputs=values), MOVED[dtype], strict=True):
        assert seconds(operations) == pytest.approx(bytes_each * plain, rel=0.02)


def test_what_a_dispatch_brought_with_other_scales_is_widened() -> None:
    fused: FusedCasts = {"input_is_fp8": True, "arrives": True}
    assert fp8_casts(writer("fp8_block"), "p", inputs=TOKENS, outputs=TOKENS, **fused).forward == []
    kinds = [each.label.name for each in fp8_casts(writer("fp8"), "p", inputs=TOKENS, outputs=TOKENS, **fused).forward]
    assert kinds == ["p.widen", "p.largest", "p.cast"]


def test_weights_are_cast_behind_the_optimizer_and_not_by_micro_batches() -> None:
    for gemm, expected in (("fp8", ["weights.cast"]), ("bf16", [])):
        scenario = load_scenario("scenarios/two-nodes-hierarchical.yaml", [f"workload.precision.gemm={gemm}"])
        block = optimizer_block(scenario, kernel_model("h100"), parameters=1e9, gemms=1e9)
        assert [each.label.name for each in block.operations if "weights" in each.label.name] == expected
        passes = dense_ffn_part(writer(scenario.workload.precision.kernels), step())
        assert not [each for each in (*passes[0], *passes[1]) if "weights" in each.label.name]


def test_weights_that_the_optimizer_writes_in_fp8_are_only_turned() -> None:
    w = writer("fp8_block")
    turned, cast = (weight_casts(w, weights=1e9, are_narrow=narrow) for narrow in (True, False))
    assert seconds(turned) < seconds(cast)
    assert weight_casts(writer("bf16"), weights=1e9, are_narrow=False) == []


@pytest.mark.parametrize("done", ["input_is_fp8", "gradient_is_fp8", "gradient_is_turned"])
def test_what_a_kernel_before_did_is_not_done_again(done: str) -> None:
    w = writer("fp8_block")
    whole = fp8_casts(w, "p", inputs=TOKENS * K, outputs=TOKENS * N)
    fused: FusedCasts = {done: True}  # type: ignore[misc]
    less = fp8_casts(w, "p", inputs=TOKENS * K, outputs=TOKENS * N, **fused)
    assert seconds([op for part in less for op in part]) < seconds([op for part in whole for op in part])


@pytest.mark.parametrize(("dtype", "casts"), [("fp8", ["quantise"]), ("bf16", ["shared.w13.cast"])])
def test_no_tensor_is_cast_twice(dtype: str, casts: list[str]) -> None:
    """Tokens go to the shared experts and, in FP8, to the others; latent queries and keys have one input."""
    scenario = load_scenario("scenarios/two-nodes-hierarchical.yaml", [f"dispatch.dtype={dtype}"])
    samples, _ = draw_samples(scenario, obtain_trace(scenario))
    kernels = kernel_model("h800", profile="roofline")
    program = build_program(scenario, fabric=build_fabric(scenario.cluster), kernels=kernels, samples=samples[:1])
    blocks = {run.block.name: run.block for task in program.groups[-1].tasks for run in task.runs}
    layer = max(each.label.layer for each in blocks["forward"].operations)
    ahead, back = (
        [each.label.name for each in blocks[name].operations if each.label.layer == layer and each.kind is Kind.COMPUTE]
        for name in ("forward", "backward")
    )
    assert [name for name in ahead if name in ("quantise", "shared.w13.cast", "shared.w2.cast")] == casts
    gradients = "quantise.cast.backward" if dtype == "fp8" else "shared.w2.cast.backward"
    found = [name for name in back if name.startswith(("quantise", "shared.w2.cast"))]
    assert found == [gradients]
    queries = next(name.removesuffix(".cast") for name in ahead if name in ("q.cast", "q_down.cast"))
    for found, word in ((ahead, "cast"), (back, "turn")):
        assert [name for name in found if name in (f"{queries}.{word}", f"kv_down.{word}")] == [f"{queries}.{word}"]
    assert [name for name in back if name.startswith("kv_down.cast")] == ["kv_down.cast.backward"], (
        "of its own gradient"
    )

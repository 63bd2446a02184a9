"""No result leaves that breaks physics or arithmetic, in any number format; and MFU says what it divides by.

What is not finite is no result: a run with such a number is named and leaves nothing behind.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from moesim.errors import UserError
from moesim.network import Fabric, build_fabric
from moesim.report import facts
from moesim.results import RunRecord
from moesim.results.definitions import bounds, check_plausible
from moesim.results.metrics import utilisation
from moesim.results.store import write_run
from moesim.run import simulate
from moesim.scenario import Scenario, gpu_spec
from moesim.scenario.flops import TRAINING_PASSES, forward_flops_per_token

pytestmark = pytest.mark.usefixtures("few_tokens")

FP32 = {"workload.precision": {"gemm": "fp32", "weights": "fp32", "gradients": "fp32"}}
LARGE_HEAD = {"model.vocab": 200_000, "workload.global_batch": 8, "workload.micro_batch": 1}


@cache
def simulated(scenario: Scenario) -> RunRecord:
    """Several tests ask for the same run."""
    return simulate(scenario)


def fabric_of(record: RunRecord) -> Fabric:
    return build_fabric(record.scenario.cluster)


@pytest.mark.parametrize("profile", [None, "roofline"])
@pytest.mark.parametrize("gpu", ["a100", "h200", "b200"])
@pytest.mark.parametrize("kind", ["fused", "torch_eager"])
def test_gemms_in_fp32_are_no_faster_than_fp32_units(small, profile, gpu, kind) -> None:
    """Head, router gate and attention too: none of them keeps the price of bf16."""
    record = simulated(
        small(FP32 | LARGE_HEAD | {"cluster.gpu": gpu, "compute.profile": profile, "implementation.kind": kind})
    )
    scenario, parts = record.scenario, record.result["attribution_s"]
    peak = scenario.parallelism.world_size * gpu_spec(gpu).peak_flops["fp32"]
    flops = forward_flops_per_token(scenario.model, sequence_length=scenario.workload.sequence_length, causal=True)
    tokens = TRAINING_PASSES * scenario.tokens_per_step
    assert parts["embedding_head"] >= tokens * flops["head"] / peak
    assert parts["attention"] >= tokens * (flops["attention_projections"] + flops["attention_scores"]) / peak
    assert parts["router"] >= tokens * flops["router"] / peak
    assert record.result["mfu"]["causal"] < 1


def test_attention_in_half_precision_costs_what_bf16_costs(small) -> None:
    found = [
        simulated(small({"workload.precision": {"gemm": gemm}, "compute.profile": None})) for gemm in ("bf16", "fp16")
    ]
    assert found[0].result["step_time_s"] == found[1].result["step_time_s"]


@pytest.mark.parametrize(
    "changes",
    [
        {"capacity": {"kind": "expert", "factor": 1e-3}},  # hardly a row is computed: MFU of all rows means nothing
        {"workload.precision": {"gemm": "fp8"}, "dispatch": {"dtype": "fp8"}},
        {"workload.sequence_length": 65536, "workload.micro_batch": 1, "workload.global_batch": 4},
        {"workload.sequence_length": 8, "workload.micro_batch": 1, "workload.global_batch": 4},
        {"parallelism.zero": {"dense": 3, "expert": 3}, "workload.recompute": "full"},
        {"cluster": {"gpu": "a100", "nodes": 2, "gpus_per_node": 2, "fabric": {"nic": "1 Gbps"}}},
    ],
)
def test_what_is_simulated_takes_as_long_as_its_flops_and_bytes(small, changes) -> None:
    record = simulated(small(changes))
    for bound in bounds(record, fabric_of(record)):
        assert bound.seconds <= record.result["step_time_s"], bound.why
    assert min(record.result["attribution_s"].values()) >= 0


def of_result(**changes: object) -> Callable[[RunRecord], RunRecord]:
    return lambda record: replace(record, result=record.result | changes)


def faster(record: RunRecord, factor: float) -> RunRecord:
    """The record as a step of `factor` times the speed would have it, all its parts in proportion."""
    parts = {name: seconds / factor for name, seconds in record.result["attribution_s"].items()}
    step_s = record.result["step_time_s"] / factor
    mfu = record.result["effective"]["mfu_causal"] * factor
    effective = record.result["effective"] | {"mfu_causal": mfu}
    return of_result(step_time_s=step_s, attribution_s=parts, effective=effective)(record)


def part_below_zero(record: RunRecord) -> RunRecord:
    parts = record.result["attribution_s"]
    return of_result(attribution_s=parts | {"bubble": -0.1, "other": parts["other"] + parts["bubble"] + 0.1})(record)


def more_states(record: RunRecord) -> RunRecord:
    return replace(record, arrays=record.arrays | {"held_bytes_P": record.arrays["held_bytes_P"] + 1e15})


def more_traffic(record: RunRecord) -> RunRecord:
    return of_result(communication=record.result["communication"] | {"intra_node_bytes": 1e15})(record)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda record: faster(record, 1e3), r"its FLOPs at the bf16 peak of h200 \(MFU \d+%\) take"),
        (more_states, "weights, gradients and optimizer states at the memory bandwidth of h200 take"),
        (more_traffic, "dispatched and combined bytes over the links of the GPUs take"),
        (part_below_zero, r"attribution_s\.bubble is -0\.1 s"),
        (lambda record: of_result(step_time_s=2 * record.result["step_time_s"])(record), "parts of the step add up to"),
        (of_result(tokens_per_second=float("nan")), "tokens_per_second is nan"),
        (lambda r: replace(r, arrays=r.arrays | {"traffic_RR": r.arrays["traffic_RR"] / 0.0}), "traffic_RR holds"),
    ],
)
@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value)")
def test_a_result_that_cannot_be_fails_in_one_line(small, broken, said) -> None:
    record = simulated(small())
    check_plausible(record, fabric_of(record))
    with pytest.raises(UserError, match=said) as error:
        check_plausible(broken(record), fabric_of(record))
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 1


def test_mfu_names_its_peak_and_stands_beside_that_of_bf16(small) -> None:
    """The same FLOPs over a peak of 1978.9 and of 989.4 TFLOP/s."""
    fp8 = utilisation(small({"workload.precision": {"gemm": "fp8"}}), 1.0)
    bf16 = utilisation(small(), 1.0)
    assert (fp8["peak"], bf16["peak"]) == ("fp8", "bf16")
    for count in ("causal", "non_causal"):
        assert fp8[count] == pytest.approx(bf16[count] * 989.4 / 1978.9, rel=1e-12)
        assert fp8[f"{count}_of_bf16_peak"] == bf16[f"{count}_of_bf16_peak"] == bf16[count]


def test_screen_and_page_show_both_peaks_of_an_fp8_run(small) -> None:
    result = simulated(small({"workload.precision": {"gemm": "fp8"}})).result
    (shown,) = [fact for fact in facts.headline(result) if fact.label == "MFU"]
    assert shown.value == facts.percent(result["mfu"]["causal"])
    assert "of the fp8 peak" in shown.note
    assert f"Of the bf16 peak {facts.percent(result['mfu']['causal_of_bf16_peak'])}" in shown.note
    (plain,) = [fact for fact in facts.headline(simulated(small()).result) if fact.label == "MFU"]
    assert plain.note.startswith("of the bf16 peak, causal attention;")


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_not_written(small, tmp_path, number: float) -> None:
    record = simulated(small())
    wrong = [
        (replace(record, result=record.result | {"cost": {"usd_per_step": number}}), "cost.usd_per_step is "),
        (
            replace(record, arrays={**record.arrays, "step_time_S": np.array([1.0, number])}),
            "step_time_S of arrays.npz has numbers that are not finite",
        ),
    ]
    for changed, text in wrong:
        with pytest.raises(UserError, match="no result") as error:
            write_run(changed, tmp_path / "out")
        assert text in str(error.value)
        assert not (tmp_path / "out").exists()

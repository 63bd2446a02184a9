"""A step's kernels do the FLOPs that `flops` counts, whatever kinds of layers the model has, also within a window."""

from functools import cache

import pytest

from moesim.kernels import Attention, Gemm, GroupedGemm, kernel_model
from moesim.network import build_fabric
from moesim.parallel import TrafficSampler
from moesim.program import build_program
from moesim.results import RunRecord
from moesim.run import obtain_trace, simulate
from moesim.scenario import Scenario
from moesim.scenario.flops import forward_flops_per_token, keys_per_query
from moesim.seeding import stream

pytestmark = pytest.mark.usefixtures("few_tokens")

ALONE = {"parallelism": {"data": 1, "expert": 1}, "workload.global_batch": 2}
KINDS = {
    "plain": {},
    "two matrices": {"model.gated": False},
    "latent width": {"model.expert_hidden": 256},
    "dense beside experts": {"model.shared_experts": 1, "model.shared_intermediate": 3072},
    "window": {"model.local": {"window": 128, "layers": [0]}},
    "chunks": {"model.local": {"window": 256, "chunked": True, "layers": [0]}},
}


@cache
def simulated(scenario: Scenario) -> RunRecord:
    """Several tests ask for the same run."""
    return simulate(scenario)


class Recorder:
    """A kernel model that adds up the forward FLOPs it was asked for, by kernel."""

    def __init__(self, model) -> None:
        self.model, self.asked = model, []

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def seconds(self, kernel):
        if isinstance(kernel, Attention | Gemm | GroupedGemm) and kernel.direction == "forward":
            self.asked.append((type(kernel), kernel))
        return self.model.seconds(kernel)


def asked(scenario) -> dict:
    """Forward FLOPs of one layer of each kind that was priced, by kernel."""
    sample = TrafficSampler(scenario, obtain_trace(scenario)).draw(stream(0, "test", 0))
    recorder = Recorder(kernel_model("h200", "roofline"))
    build_program(scenario, fabric=build_fabric(scenario.cluster), kernels=recorder, samples=[sample])
    return recorder.asked


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_of_a_step_do_the_counted_flops(small, kind: str) -> None:
    scenario = small(ALONE | {"model.layers": 1, "model.dense_layers": 0, "model.mtp_layers": 0} | KINDS[kind])
    tokens = scenario.tokens_per_micro_batch
    length = scenario.workload.sequence_length
    counted = forward_flops_per_token(scenario.model, sequence_length=length, causal=True)
    found = dict.fromkeys(("attention_scores", "experts", "others"), 0.0)
    names = {Attention: "attention_scores", GroupedGemm: "experts", Gemm: "others"}
    for family, kernel in asked(scenario):
        flops = kernel.flops
        if family is GroupedGemm and flops.ndim:
            flops = flops.reshape(-1)[:1]  # micro-batches of the layer
        found[names[family]] += float(flops.sum())
    others = sum(counted[part] for part in counted if part not in ("attention_scores", "routed_experts"))
    assert found["others"] == pytest.approx(tokens * others, rel=1e-9)
    assert found["experts"] == pytest.approx(tokens * counted["routed_experts"], rel=1e-9)
    assert found["attention_scores"] == pytest.approx(tokens * counted["attention_scores"], rel=5e-3)


def step(scenario) -> dict:
    return simulated(scenario).result


def test_a_window_in_every_layer_is_the_window_of_the_model(small) -> None:
    everywhere = step(small({"model.attention": {"kind": "local_global", "window": 128, "global_every": None}}))
    layers = list(range(small().model.layers))
    assert step(small({"model.local": {"window": 128, "layers": layers}}))["step_time_s"] == everywhere["step_time_s"]


def test_more_local_layers_are_faster(small) -> None:
    num = small().model.layers
    steps = [step(small({"model.local": {"window": 64, "layers": list(range(n))}}))["step_time_s"] for n in (0, 1, num)]
    assert steps == sorted(steps, reverse=True) and steps[0] > steps[-1]


def test_rows_of_a_latent_width_are_as_many_bytes_on_the_links(small) -> None:
    whole, half = small(), small({"model.expert_hidden": small().model.hidden // 2})
    for key in ("dispatch_bytes", "combine_bytes"):
        assert step(half)["communication"][key] == pytest.approx(step(whole)["communication"][key] / 2)


def test_dense_layers_first_or_given_by_number_are_the_same_step(small) -> None:
    first = small({"model.layers": 3, "model.dense_layers": 1})
    named = small({"model.layers": 3, "model.dense_layers": 1, "model.dense_at": [0]})
    last = small({"model.layers": 3, "model.dense_layers": 1, "model.dense_at": [2]})
    assert step(named)["step_time_s"] == step(first)["step_time_s"]
    assert step(last)["step_time_s"] == pytest.approx(step(first)["step_time_s"], rel=0.05)


class AttentionRecorder:
    """A kernel model that remembers the forward attention kernels it was asked for."""

    def __init__(self, model) -> None:
        self.model, self.asked = model, []

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def seconds(self, kernel):
        if isinstance(kernel, Attention) and kernel.direction == "forward":
            self.asked.append((kernel.batch, kernel.sequence, kernel.causal))
        return self.model.seconds(kernel)


def window(length: int, every: int | None = None) -> dict:
    return {"model.attention": {"kind": "local_global", "window": length, "global_every": every}}


@pytest.mark.parametrize("every", [None, 1, 32])
@pytest.mark.parametrize("length", [1, 64, 1000, 2047, 2048, 4096])
def test_kernels_do_the_pairs_of_the_flop_count(small, length: int, every: int | None) -> None:
    scenario = small(window(length, every))
    sample = TrafficSampler(scenario, obtain_trace(scenario)).draw(stream(0, "test", 0))
    recorder = AttentionRecorder(kernel_model("h200", "roofline"))
    build_program(scenario, fabric=build_fabric(scenario.cluster), kernels=recorder, samples=[sample])
    kernels = set(recorder.asked)
    pairs = sum(batch * tokens * ((tokens + 1) / 2 if causal else tokens) for batch, tokens, causal in kernels)
    work = scenario.workload
    keys = keys_per_query(scenario.model, sequence_length=work.sequence_length, causal=True).total
    assert pairs == pytest.approx(work.micro_batch * work.sequence_length * keys, rel=5e-3)


def test_a_window_of_the_sequence_is_none_and_a_narrower_one_is_faster(small) -> None:
    full = simulated(small()).result
    assert simulated(small(window(2048))).result["step_time_s"] == full["step_time_s"]
    steps = [simulated(small(window(length))).result["step_time_s"] for length in (64, 256, 1024, 2048)]
    assert steps == sorted(steps)
    assert steps[0] < steps[-1]


def test_a_window_of_the_sequence_may_be_shared_by_context_ranks(small) -> None:
    shared = {"parallelism": {"data": 2, "context": 2, "expert": 4}}
    assert (
        simulated(small(shared | window(2048))).result["step_time_s"] == simulated(small(shared)).result["step_time_s"]
    )

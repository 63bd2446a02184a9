"""Attention over a window: the kernels do the pairs of query and key that the FLOP count states, and no more."""

import pytest

from moesim.kernels import Attention, kernel_model
from moesim.network import build_fabric
from moesim.parallel import TrafficSampler
from moesim.program import build_program
from moesim.run import obtain_trace, simulate
from moesim.scenario.flops import keys_per_query
from moesim.seeding import stream


class Recorder:
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
    recorder = Recorder(kernel_model("h200", "roofline"))
    build_program(scenario, fabric=build_fabric(scenario.cluster), kernels=recorder, samples=[sample])
    kernels = set(recorder.asked)
    pairs = sum(batch * tokens * ((tokens + 1) / 2 if causal else tokens) for batch, tokens, causal in kernels)
    work = scenario.workload
    keys = keys_per_query(scenario.model, sequence_length=work.sequence_length, causal=True).total
    assert pairs == pytest.approx(work.micro_batch * work.sequence_length * keys, rel=5e-3)


def test_a_window_of_the_sequence_is_none_and_a_narrower_one_is_faster(small) -> None:
    full = simulate(small()).result
    assert simulate(small(window(2048))).result["step_time_s"] == full["step_time_s"]
    steps = [simulate(small(window(length))).result["step_time_s"] for length in (64, 256, 1024, 2048)]
    assert steps == sorted(steps)
    assert steps[0] < steps[-1]


def test_a_window_of_the_sequence_may_be_shared_by_context_ranks(small) -> None:
    shared = {"parallelism": {"data": 2, "context": 2, "expert": 4}}
    assert simulate(small(shared | window(2048))).result["step_time_s"] == simulate(small(shared)).result["step_time_s"]

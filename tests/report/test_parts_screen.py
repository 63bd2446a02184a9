"""The parts of a step: what is printed adds up to the step, and pairs appear where passes overlap."""

import io

import pytest

from moesim.report.run_view import print_parts, step_parts
from moesim.run import simulate
from moesim.scenario import load_scenario

PIPELINE = (
    "cluster.nodes=2",
    "parallelism.pipeline=2",
    "workload.global_batch=64",
    "uncertainty.samples=1",
    "model.layers=8",
)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("1f1b", {"forward", "backward"}),
        ("zb_h1", {"forward", "backward, inputs", "backward, weights"}),
        ("dualpipe", {"forward", "forward and backward overlapped"}),
    ],
)
def test_parts_of_every_kind_of_schedule(kind: str, names: set[str]) -> None:
    record = simulate(
        load_scenario("scenarios/uniform-dropless.yaml", (*PIPELINE, f"parallelism.schedule.kind={kind}"))
    )
    parts = {part.name: part for part in step_parts(record)}
    assert names <= parts.keys()
    assert parts["optimizer"].total_s > 0
    idle = parts["idle (bubble, waiting for other ranks)"]
    assert 0 < idle.total_s < record.result["step_time_s"]
    alone = [part.total_s for name, part in parts.items() if "gradients" not in name]
    together = sum(alone) + parts["gradients and parameters between ranks"].total_s
    assert sum(alone) <= record.result["step_time_s"] * 1.001 <= together * 1.002  # reductions may lie beside passes
    out = io.StringIO()
    print_parts(record, file=out, width=100)
    assert all(name in out.getvalue() for name in names)

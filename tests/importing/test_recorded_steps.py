"""A step recorded without a GPU has every operation of the module, with the FLOPs of its formula, and its most memory.

Storages are alive on the meta device; their bytes stand beside hand-counted and measured ones.
"""

import gzip
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from moesim.errors import UserError
from moesim.importing.program import record_program
from moesim.importing.recording import record_step
from moesim.kernels import kernel_model
from moesim.parallel.memory.libraries import WORKSPACE_BYTES
from moesim.parallel.memory.report import memory_report
from moesim.parallel.memory.rows import even_rows
from moesim.recorded.estimate import step_estimate
from moesim.recorded.host import HOST, PACES
from moesim.recorded.peak import recorded_memory, step_peak
from moesim.recorded.pricing import launch_of
from moesim.recorded.scaling import updating
from moesim.recorded.step_file import MODULES, NODES, PYTHON, VIEWS, load_step, save_step
from moesim.strict_json import parse_json

TOKENS, HIDDEN, WIDTH = 512, 64, 256
HOST_FACTS = (VIEWS, MODULES, PYTHON, NODES)


def small_step():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(HIDDEN, WIDTH, bias=False), nn.SiLU(), nn.Linear(WIDTH, HIDDEN, bias=False))
        inputs = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    return model, lambda: model(inputs).square().mean()


def test_gemms_of_both_passes_have_their_flops() -> None:
    ops = record_step(*small_step())
    flops = sum(op.count * float(np.sum(kernel.flops)) for op in ops for kernel in launch_of(op).kernels)
    assert flops == 3 * 2 * (2 * TOKENS * HIDDEN * WIDTH)  # forward and both gradients of two GEMMs
    assert {op.phase for op in ops} == {"forward", "backward", "optimizer"}
    (optimizer,) = (op for op in ops if op.phase == "optimizer")
    assert optimizer.facts["parameters"] == 2 * HIDDEN * WIDTH


def test_views_are_free_and_modules_are_named() -> None:
    ops = record_step(*small_step())
    assert not {"t", "transpose", "view", "expand", "detach"} & {op.name for op in ops}
    assert [op.module for op in ops if op.name == "silu"] == ["*"]


def test_what_the_host_does_between_operations_is_counted() -> None:
    class Plain(nn.Module):
        def forward(self, x, turns: int = 0):
            for _ in range(turns):
                pass
            return x.t().t() + 1.0

    def done(turns: int) -> list[dict[str, float]]:
        with torch.device("meta"):
            model, inputs = Plain(), torch.randn(8, 8, requires_grad=True)
            model.weight = nn.Parameter(torch.ones(8))
        ops = record_step(model, lambda: (model(inputs, turns) * model.weight).sum())
        sums = [
            {key: sum(op.count * op.facts.get(key, 0) for op in ops if op.phase == phase) for key in HOST_FACTS}
            for phase in ("forward", "backward")
        ]
        return [*sums, {"python": sys.gettrace() is None}]

    tracing = sys.gettrace() is None
    forward, backward, behind = done(0)
    assert forward[MODULES] == 1 and forward[VIEWS] == 2 and forward[PYTHON] > 5 and forward[NODES] == 0
    assert backward[NODES] == 2 and backward[PYTHON] == 0  # sum and mul; nothing is launched behind the others
    assert done(0)[0] == forward and done(50)[0][PYTHON] >= forward[PYTHON] + 100
    assert behind["python"] is tracing  # a tracer that was there is there again


def test_a_host_that_is_slower_and_one_that_needs_the_same_for_all() -> None:
    ops = record_step(*small_step())
    whole = step_estimate(ops, kernel_model("h100")).host_s
    assert step_estimate(ops, kernel_model("h100"), host=HOST.paced(2.0)).host_s == pytest.approx(2 * whole)
    alike = step_estimate(ops, kernel_model("h100"), host=HOST.per_op(1e-5)).host_s
    assert alike == pytest.approx(1e-5 * sum(op.count for op in ops))
    least, most = step_estimate(ops, kernel_model("h100")).by_host_s
    assert (least, most) == pytest.approx(tuple(whole * pace for pace in PACES))


def test_a_step_that_does_not_say_what_its_host_does_has_what_others_have() -> None:
    ops = record_step(*small_step())
    silent = [replace(op, facts={key: fact for key, fact in op.facts.items() if key not in HOST_FACTS}) for op in ops]
    said, usual = (step_estimate(each, kernel_model("h100")).host_s for each in (ops, silent))
    assert usual == pytest.approx(said, rel=0.5) and usual != said


def test_attention_is_one_operation_each_way() -> None:
    class Heads(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    with torch.device("meta"):
        inputs = torch.randn(2, 4, 128, 64, dtype=torch.bfloat16, requires_grad=True)
        model = nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16), Heads())
    ops = [op for op in record_step(model, lambda: model(inputs).sum()) if op.name == "scaled_dot_product_attention"]
    assert [(op.phase, op.facts["causal"]) for op in ops] == [("forward", True), ("backward", True)]
    forward, backward = (float(launch_of(op).kernels[0].flops) for op in ops)
    assert forward == 2 * 4 * (64 + 64) * 2 * 128**2 / 2
    assert backward == 2.5 * forward


def test_a_file_keeps_the_step(tmp_path: Path) -> None:
    ops = record_step(*small_step())
    for name in ("step.json", "step.json.gz"):
        save_step(tmp_path / name, ops, source="here")
        assert load_step(tmp_path / name) == ("here", ops)


@pytest.mark.parametrize("given", [(None, 0.0, True), ("mask",)])
def test_attention_given_by_position_is_causal_too(given) -> None:
    with torch.device("meta"):
        inputs = torch.randn(2, 4, 128, 64, dtype=torch.bfloat16, requires_grad=True)
        given = tuple(torch.zeros(128, 128) if each == "mask" else each for each in given)
        model = nn.Linear(64, 64, dtype=torch.bfloat16)
    attention = nn.functional.scaled_dot_product_attention
    ops = record_step(model, lambda: attention(*[model(inputs)] * 3, *given).sum())
    assert [op.facts["causal"] for op in ops if op.name == "scaled_dot_product_attention"] == [True, True]


def test_a_recorded_operation_that_cannot_be_is_an_error_of_the_file() -> None:
    good = record_step(*small_step())
    for changes in (
        {"name": "scaled_dot_product_attention", "reads": ()},
        {"name": "mm", "reads": (((4, 4), "float32", 64),)},
        {"name": "_fused_adamw_", "facts": {}},
        {"name": "mm", "reads": (((4, 4), "float32", 64),) * 2, "facts": {"aligned_bytes": 5}},
        {"name": "index_put", "phase": "backward", "reads": ()},
        {"name": "_fused_adamw_", "facts": {"parameters": -1}},
        {"name": "_fused_adamw_", "facts": {"parameters": "many"}},
    ):
        with pytest.raises(UserError, match="cannot be"):
            step_estimate([replace(good[0], **changes)], kernel_model("h100"))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"schema_version": 1, "ops": [{"name": "mm"}]}'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "step.json"
    path.write_text(text)
    with pytest.raises(UserError, match="step"):
        load_step(path)


def test_a_step_takes_the_longer_of_gpu_and_host() -> None:
    ops = record_step(*small_step())
    estimate = step_estimate(ops, kernel_model("h100"))
    assert estimate.step_s == pytest.approx(estimate.host_s)  # a tiny model
    assert estimate.host_s > estimate.kernels_s + estimate.gaps_s
    fast = step_estimate(ops, kernel_model("h100"), host=HOST.times(0.0))
    assert fast.step_s == pytest.approx(fast.kernels_s + fast.gaps_s)


PROGRAM = """
import torch
from torch import nn

def works():
    model = nn.Linear(8, 8)
    return model, lambda: model(torch.randn(4, 8)).sum()

def depends_on_data():
    model = nn.Linear(8, 8)
    return model, lambda: model(torch.randn(4, 8).nonzero().float()).sum()

def nothing():
    return 3

def raises():
    raise KeyError("boom")

def raises_late():
    model = nn.Linear(8, 8)
    return model, lambda: {}["boom"]

def no_loss():
    model = nn.Linear(8, 8)
    return model, lambda: model(torch.randn(4, 8))

def frozen():
    model = nn.Linear(8, 8).requires_grad_(False)
    return model, lambda: model(torch.randn(4, 8, requires_grad=True)).sum()

def real():
    model = nn.Linear(8, 8, device="cpu")
    return model, lambda: model(torch.randn(4, 8)).sum()
"""


def test_a_program_by_file_and_name(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    assert any(op.name in ("mm", "addmm") for op in record_program(f"{path}:works"))
    for name, said in {
        "depends_on_data": "does not run on the meta device",
        "nothing": "must return",
        "real": "is not on the meta device",
        "missing": "no function",
        "raises": "raised KeyError",
        "raises_late": "raised KeyError",
        "no_loss": "must return the loss",
        "frozen": "nothing to train",
    }.items():
        with pytest.raises(UserError, match=said):
            record_program(f"{path}:{name}")
    with pytest.raises(UserError, match="does not exist"):
        record_program(f"{tmp_path}/other.py:works")
    with pytest.raises(UserError, match="cannot import"):
        record_program("no_such_module_here:works")


def test_dropout_is_one_kernel_each_way() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.1), nn.Dropout(0.0))
        inputs = torch.randn(8, 64)
    ops = [op for op in record_step(model, lambda: model(inputs).sum()) if "dropout" in op.name]
    assert [(op.name, op.phase, op.count) for op in ops] == [
        ("native_dropout", "forward", 1),
        ("native_dropout_backward", "backward", 1),
    ]
    assert not {"bernoulli", "bernoulli_"} & {op.name for op in ops}


@pytest.mark.parametrize(("width", "aligned"), [(64, None), (65, 2), (66, 4), (68, 8)])
def test_gemms_whose_rows_begin_anywhere_are_priced_as_such(width: int, aligned: int | None) -> None:
    with torch.device("meta"):
        model = nn.Linear(64, width, bias=False, dtype=torch.bfloat16)
        inputs = torch.randn(33, 64, dtype=torch.bfloat16, requires_grad=True)  # an odd number of rows slows nothing
    ops = [op for op in record_step(model, lambda: model(inputs).square().sum()) if op.name == "mm"]
    assert [op.facts.get("aligned_bytes") for op in ops] == [aligned] * 3
    plain = step_estimate([replace(op, facts={}) for op in ops], kernel_model("h100"))
    priced = step_estimate(ops, kernel_model("h100"))
    assert {op.kind.endswith(" unaligned") for op in priced.ops} == {aligned is not None}
    assert (priced.kernels_s > 2.5 * plain.kernels_s) is (aligned is not None)


def test_attention_with_dropout_is_priced_as_such() -> None:
    with torch.device("meta"):
        model = nn.Linear(64, 64, dtype=torch.bfloat16)
        inputs = torch.randn(2, 4, 128, 64, dtype=torch.bfloat16)
    attention, times = nn.functional.scaled_dot_product_attention, []
    for share in (0.0, 0.1):
        ops = record_step(model, lambda share=share: attention(*[model(inputs)] * 3, dropout_p=share).sum())
        found = [op for op in step_estimate(ops, kernel_model("h100")).ops if op.family.startswith("attention")]
        assert len(found) == 2 and {op.family.endswith(" dropout") for op in found} == {share > 0}
        times.append(sum(op.seconds for op in found))
    assert times[1] > 1.2 * times[0]


def test_a_condition_on_data_is_noted() -> None:
    class Skips(nn.Module):
        def forward(self, x):
            return x if (x > 0).all() else x.exp()

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), Skips())
        inputs = torch.randn(4, 8)
    ops = record_step(model, lambda: model(inputs).sum())
    assert [op.module for op in step_estimate(ops, kernel_model("h100")).ops if op.assumed] == ["*"]


@pytest.mark.parametrize(("share", "dropped"), [(0.0, False), (0.1, False), (0.9, True)])
def test_a_layer_is_dropped_where_that_is_likelier(share: float, dropped: bool) -> None:
    class Drops(nn.Module):
        def forward(self, x):
            return x if torch.rand([]) < share else x.exp()

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), Drops())
        inputs = torch.randn(4, 8)
        ops = record_step(model, lambda: model(inputs).sum())
    assert ("exp" not in {op.name for op in ops}) is dropped
    assert not any(op.assumed for op in step_estimate(ops, kernel_model("h100")).ops)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def step(model): return model", "takes model, and nothing is given"),
        ("def step(): raise SystemExit(3)", "SystemExit"),
        ("step = 3", "no function 'step'"),
        ("def step(): return made(lambda m: m(torch.randn(4, 8).cpu()).sum())", "on the device that they are made on"),
        ("def step(): return made(lambda m: m(torch.randn(4, 8)).sum().item())", "does not run on the meta device"),
        ("def step(): return made(torch.compile(lambda m: m(torch.randn(4, 8)).sum()))", "calls torch.compile"),
        ("def step(): return made(lambda m: m(torch.randn(4, 9)).sum())", "raised RuntimeError"),
        ("def step(): return made(trained)", "runs a backward pass itself"),
        ("def step(): return made(cast)", "uses torch.autocast"),
        ("def step(): return made(lambda m: m(torch.randn(4, 8)).nonzero().sum())", "without operations that depend"),
        (
            "def step(): return made(lambda m: m(torch.randn(4, 8)).detach().numpy())",
            "on the device that they are made",
        ),
        ("def step(): return made(lambda m: len(m(torch.randn(4, 8)), 3))", "raised TypeError: len"),
        (
            "def step(): return made(lambda m: torch.view_as_complex(m(torch.randn(4, 8)).view(-1, 2)).sum())",
            "one real",
        ),
    ],
)
def test_programs_that_cannot_be_recorded_are_told_the_remedy(body: str, said: str, tmp_path: Path) -> None:
    made = """import torch
def made(loss):
    model = torch.nn.Linear(8, 8)
    return model, lambda: loss(model)
def trained(model):
    model(torch.randn(4, 8)).sum().backward()
    return model(torch.randn(4, 8)).sum()
def cast(model):
    with torch.autocast("cuda", dtype=torch.bfloat16):
        return model(torch.randn(4, 8)).sum()
"""
    (tmp_path / "its_step.py").write_text(made + body)
    with pytest.raises(UserError, match=said) as error:
        record_program(f"{tmp_path / 'its_step.py'}:step")
    assert "\n" not in str(error.value)


ROOT = Path(__file__).parents[2]
ROWS, SIDE, INNER = 4096, 512, 2048
FP32 = 4


def step():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(SIDE, INNER, bias=False), nn.Linear(INNER, SIDE, bias=False))
        inputs = torch.randn(ROWS, SIDE)
    return model, lambda: model(inputs).square().mean()


def test_what_is_alive_is_what_a_hand_counts() -> None:
    """Of Y = X W1 W2 and mean(Y^2): behind the first GEMM of the way back stand X, X W1, the gradients of Y, of X W1
    and of W2."""
    peak = step_peak(record_step(*step()))
    assert peak is not None
    weights, wide, narrow = (FP32 * size for size in (2 * SIDE * INNER, ROWS * INNER, ROWS * SIDE))
    assert peak.held == weights + narrow and peak.states == 2 * weights
    assert peak.phase == "backward"
    assert peak.moving == pytest.approx(2 * wide + narrow + weights / 2 + WORKSPACE_BYTES, rel=1e-3)
    later = step_peak(record_step(*step()), micro_batches=3)
    assert later is not None and later.total == peak.total + weights


def test_a_file_keeps_the_peak_and_another_size_has_none(tmp_path: Path) -> None:
    ops = record_step(*step())
    save_step(tmp_path / "step.json", ops, source="here")
    assert step_peak(load_step(tmp_path / "step.json")[1]) == step_peak(ops)
    assert step_peak([*ops[:-1], updating(ops[-1], 77)]) is None
    assert step_peak(ops[:-1]) is None


def test_measured_peaks_of_transformers_are_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an H100, in no choice but that of a kernel's own GEMM; `python tools/peak_table.py` has all 34 steps."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    from measure_peaks import Case
    from peak_table import recorded_bytes

    data = parse_json(gzip.decompress((ROOT / "tests" / "data" / "peaks_h100.json.gz").read_bytes()))
    rows = {row["case"]["name"]: row for row in data["steps"]}
    for name in ("qwen3-short", "olmoe-twice", "mixtral-eager", "v3-like-short"):
        row = rows[name]
        measured = max(row[moment] for moment in ("forward", "backward", "optimizer"))
        assert recorded_bytes(Case(**row["case"])) == pytest.approx(measured, rel=0.005), name


@pytest.mark.parametrize(
    ("recorded_at", "other"), [("mixtral-thrice", "mixtral-small"), ("v3-like-short", "v3-like"), ("glm", "glm-big")]
)
def test_a_scenario_of_a_recording_of_another_size_is_no_hundredth_low(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recorded_at: str, other: str
) -> None:
    """Measured on an H100; the second of each pair is in no choice."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    from measure_peaks import loss_of, module
    from peak_table import as_scenario, peaks

    found = {peak.name: peak for peak in peaks()}
    case = found[recorded_at].case
    with torch.device("meta"):
        model = module(case, "meta")
        save_step(tmp_path / "step.json", record_step(model, loss_of(case, model, "meta")), source="here")
    imported = f"implementation={{kind: imported, file: {tmp_path / 'step.json'}}}"
    scenario = as_scenario(found[other].case, imported)
    peak = memory_report(scenario, even_rows(scenario), recorded=recorded_memory(scenario)).peak_bytes
    assert -0.01 < peak / found[other].measured - 1 < 0.02

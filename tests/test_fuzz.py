"""Whatever stands in a file, its verb gives finite numbers or one line, and soon: shipped files, mutated."""

import io
import re
import time
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import at, changed, paths_of, without

from moesim.errors import LONGEST_LINE, InternalError, UserError
from moesim.planner.serving_plan import load_any_plan
from moesim.report.report import write_report
from moesim.report.run_view import print_facts
from moesim.run import simulate
from moesim.scenario import Scenario, dump_scenario, load_scenario_text
from moesim.scenario.document import parse_yaml
from moesim.scenario.routers import STRESS
from moesim.scenario.routing import TrainRouting
from moesim.serving import load_serving_text
from moesim.strict_json import json_text
from moesim.sweeper.study import load_study

FOLDER = Path(__file__).parents[1] / "scenarios"
SECONDS_TO_LOAD, SECONDS_TO_SIMULATE = 10, 60  # on a busy machine; alone a tenth of that
SMALL_RUNS, SMALL_ROWS, MOST_RANKS = 3_000, 3_000_000, 64  # what is simulated within seconds
# Sections that every mutation may swap with each other, so that kinds meet that no shipped file has together.
SPICE = """\
routing: {kind: popularity, counts: [8, 1, 1, 1, 4, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1], router: {kind: deepseek_v2}}
capacity: {kind: expert, factor: 1.25, by: score, pad: true}
placement: {kind: round_robin}
dispatch: {algorithm: hierarchical, deduplicate: per_node, dtype: fp8, sm_share: 0.1}
network: {model: fluid}
overlap: {shared_experts: false, micro_batches: true, gradient_reduction: false}
memory: {reserved: 1 GB, allocator_overhead: 0.2}
compute: {profile: roofline}
cluster:
  gpu: h100
  nodes: 2
  gpus_per_node: 4
  fabric: {preset: rail_optimised, nic: 100 Gbps, nic_latency: 3 us, nic_efficiency: 0.8, nvlink: 100 GB/s,
           leaf_latency: 1 us, pod_nodes: 1, oversubscription: {leaf: 2, spine: 2}, pxn: true, bandwidth_factor: 2.0,
           degraded: [{node: 1, factor: 0.5}, {rail: 0, factor: 0}]}
parallelism:
  {data: 4, tensor: 2, expert: 4, pipeline: 1, context: 1, expert_tensor: 1, zero: {dense: 1, expert: 2},
   schedule: {kind: 1f1b}}
workload:
  {sequence_length: 512, micro_batch: 1, global_batch: 8, train_tokens: 1e9, recompute: [swiglu],
   gradient_clipping: 1.0, precision: {gemm: fp8, weights: bf16, gradients: fp32, master: fp32, optimizer: bf16}}
"""
SMALL = """\
schema_version: 1
name: small
model:
  {layers: 4, hidden: 256, heads: 4, kv_heads: 4, head_dim: 64, attention: {kind: mha}, dense_layers: 1,
   dense_intermediate: 512, experts: 16, top_k: 4, shared_experts: 1, expert_intermediate: 128, vocab: 1000,
   tied_embeddings: false, routed_scaling_factor: 1.0, mtp_layers: 1}
routing: {kind: uniform}
capacity: {kind: device, factor: 1.0, protected_share: 0.1}
cluster: {gpu: h200, nodes: 1, gpus_per_node: 8, price_per_gpu_hour: 2.0, fabric: {preset: rail_optimised}}
parallelism: {data: 4, pipeline: 2, expert: 4, zero: {dense: 1}, schedule: {kind: zb_h1}}
workload: {sequence_length: 256, micro_batch: 1, global_batch: 16}
network: {model: ports}
uncertainty: {samples: 2, bank: 2}
seed: 0
"""


def plain(text):
    return parse_yaml(text, source="good").plain


SCENARIOS = [plain(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.yaml"))]
PLANS = [plain(path.read_text(encoding="utf-8")) for path in sorted((FOLDER / "plans").glob("*.yaml"))]
SERVING = [plain(path.read_text(encoding="utf-8")) for path in sorted((FOLDER / "serving").glob("*.yaml"))]
STUDIES = [plain(path.read_text(encoding="utf-8")) for path in sorted((FOLDER / "studies").glob("*.yaml"))]


def nested(depth, kind):
    value = 1
    for _ in range(depth):
        value = [value] if kind else {"a": value}
    return value


ODD = st.one_of(
    st.sampled_from([0, -1, 1, 2, 3, 4, 5, 7, 8, 16, 64, 1000, 2**15, 2**31, 2**63, 10**30, -(2**63)]),
    st.sampled_from([0.0, -0.0, 1e-320, 1e-12, 1e-9, 1e-3, 0.5, 1.0, 1.5, 1e3, 1e9, 1e18, 1e300, 1e308, -1.0]),
    st.sampled_from(["", "0", "1e3", "NaN", "inf", "1e-320 B/s", "1 kB/s", "1000 PB/s", "1e9 s", "0 s", "1 s", "1 B"]),
    st.sampled_from(["none", "full", "uniform", "mla", "custom", "nvl72", "exact", "fluid", "dualpipe", "fp8", "fp32"]),
    st.sampled_from([None, True, False, [], {}, [[]], [{}], {"kind": None}, {"kind": "expert", "factor": 1e-3}]),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
    st.builds(lambda char, times: char * times, st.sampled_from("aä漢\u202e\n"), st.sampled_from([1, 300, 5_000])),
    st.builds(nested, st.sampled_from([2, 20, 30, 300]), st.booleans()),
)


@st.composite
def mutated(draw, goods):
    """A shipped file with one to four of its values changed, scaled, dropped, doubled or moved."""
    value = draw(st.sampled_from(goods))
    for _ in range(draw(st.sampled_from([1, 1, 2, 2, 3, 4]))):
        path = draw(st.sampled_from(sorted(paths_of(value), key=str)))
        old = at(value, path)
        how = draw(st.sampled_from(["odd", "scale", "near", "drop", "swap", "rename", "spice", "spice"]))
        if how == "odd":
            value = changed(value, path, draw(ODD))
        elif how in ("scale", "near") and isinstance(old, int | float) and not isinstance(old, bool):
            factor = draw(st.sampled_from([0, 0.5, 2, 3, 4] if how == "near" else [-1, 1e-6, 10, 1000, 1e6, 1e12]))
            new = old * factor
            value = changed(value, path, int(new) if isinstance(old, int) else new)
        elif how == "drop" and len(value) > 1:
            value = without(value, path)
        elif how == "swap":
            other = draw(st.sampled_from(sorted(paths_of(value), key=str)))
            value = changed(value, path, at(value, other))
        elif how == "rename" and isinstance(at(value, path[:-1]), dict):
            name = draw(st.sampled_from(["kind", "preset", "nodes", "x", "", "ä", "\x00", "a" * 1000]))
            value = changed(without(value, path), path[:-1], {**at(without(value, path), path[:-1]), name: old})
        elif how == "spice":
            spice = plain(SPICE)
            there = draw(st.sampled_from(sorted(paths_of(spice), key=str)))
            if isinstance(value.get(there[0]), dict) and len(there) > 1:
                section = {**value[there[0]], there[1]: spice[there[0]][there[1]]}
                value = {**value, there[0]: section}
            else:
                value = {**value, there[0]: spice[there[0]]}
    return value


def one(*values):
    return st.sampled_from(values)


def maybe(draw, **keys):
    """Some of the keys, each with a value of its strategy."""
    return {key: draw(value) for key, value in keys.items() if draw(st.booleans())}


NIC = one("1 kB/s", "1 MB/s", "400 Gbps", "1 TB/s", "1000 PB/s")
LATENCY = one("0 s", "1e-12 s", "3 us", "1 s")
EFFICIENCY = one(0.001, 0.5, 1.0)
CAPACITIES = one(
    {"kind": "none"},
    {"kind": "device", "factor": 0.001, "protected_share": 0.0},
    {"kind": "device", "factor": 1e5},
    {"kind": "device", "factor": 1.0, "protected_share": 1.0},
    {"kind": "expert", "factor": 0.001},
    {"kind": "expert", "factor": 1.0, "pad": True},
    {"kind": "expert", "factor": 1e5, "pad": True, "by": "score"},
)
ATTENTIONS = one(
    {"kind": "mha"}, {"kind": "gqa"}, {"kind": "local_global"}, {"kind": "mla", "kv_lora_rank": 1, "rope_head_dim": 1}
)
DISPATCHES = one(
    {},
    {"dtype": "fp8"},
    {"deduplicate": "per_expert"},
    {"algorithm": "hierarchical", "deduplicate": "per_node"},
    {"algorithm": "low_latency", "deduplicate": "per_expert", "sm_share": 0.999},
)
WIDTH = one(8, 64, 1024, 2**16)


@st.composite
def routings(draw, experts):
    router = draw(one({}, {"router": {"kind": "deepseek_v3", "groups": 2, "group_limit": 1}}))
    kind = draw(one("uniform", "balancedness", "stress", "popularity"))
    if kind == "uniform":
        return {"kind": "uniform", **router}
    if kind == "balancedness":
        return {"kind": kind, "value": draw(one(1, 0.99, 0.5, 0.1)), **router}
    if kind == "stress":
        return {"kind": kind, "pattern": draw(one(*STRESS)), "severity": draw(one(0.0, 0.5, 1.0)), **router}
    rows = st.lists(one(0, 1e-12, 1, 2, 1000, 1e12), min_size=experts, max_size=experts)
    return {"kind": "popularity", "counts": draw(st.one_of(rows, st.lists(rows, min_size=1, max_size=3))), **router}


@st.composite
def fabrics(draw):
    presets = one("rail_optimised", "rail_optimised", "leaf_spine", "nvl72", "nvlink_node", "multi_plane")
    degraded = st.fixed_dictionaries({"factor": one(0, 0.001, 0.5)}, optional={"node": one(0, 1), "rail": one(0, 1)})
    return maybe(
        draw, preset=presets, nic=NIC, nvlink=NIC, nic_latency=LATENCY, nvlink_latency=LATENCY, leaf_latency=LATENCY,
        nic_efficiency=EFFICIENCY, nvlink_efficiency=EFFICIENCY, pod_nodes=one(1, 2), pxn=st.booleans(),
        nics_per_node=one(1, 2, 4),
        oversubscription=one(0.001, 0.5, 2, 1000, {"leaf": 2, "spine": 3}), bandwidth_factor=one(0.001, 2.0, 1000.0),
        degraded=st.lists(degraded, max_size=2),
    )  # fmt: skip


@st.composite
def models(draw, experts):
    heads, attention = draw(one(4, 8, 16)), draw(ATTENTIONS)
    return {
        "layers": draw(one(8, 9)), "hidden": draw(WIDTH), "heads": heads, "head_dim": draw(one(1, 64, 1024)),
        "kv_heads": heads if attention["kind"] == "mha" else draw(one(4, heads)), "attention": attention,
        "dense_layers": draw(one(0, 1)), "dense_intermediate": draw(WIDTH), "experts": experts,
        "top_k": draw(one(1, min(2, experts), experts)), "shared_experts": draw(one(0, 1, 2)),
        "expert_intermediate": draw(WIDTH), "vocab": draw(one(4, 1000, 2**24)), "mtp_layers": draw(one(0, 1)),
        "tied_embeddings": draw(st.booleans()),
    }  # fmt: skip


@st.composite
def placements(draw, experts, ranks):
    kind = draw(one("contiguous", "contiguous", "round_robin", "eplb", "by_speed", "search", "explicit"))
    common = maybe(draw, split=one("nearest"), judged_on=one("later"))
    if kind == "explicit":
        copied = draw(st.lists(one(*range(experts)), min_size=ranks, max_size=ranks))
        return {"kind": kind, "slots": [[*range(r, experts, ranks), copied[r]] for r in range(ranks)], **common}
    made = {} if kind in ("contiguous", "round_robin") else maybe(draw, made_on=one("same"))
    own = {
        "by_speed": {"speeds": draw(st.lists(one(1e-9, 0.5, 1.0, 1e9), min_size=ranks, max_size=ranks))},
        "search": {"tries": draw(one(0, 20))},
        "eplb": maybe(draw, policy=one("global")),
    }
    return {"kind": kind, "redundant_experts": draw(one(0, ranks, 3 * ranks)), **own.get(kind, {}), **common, **made}


@st.composite
def coherent(draw):
    """A scenario whose sizes fit each other, with extreme numbers within their bounds."""
    tensor, context, pipeline = draw(one(1, 1, 2, 4)), draw(one(1, 1, 2)), draw(one(1, 1, 2, 4))
    expert, copies, expert_tensor = draw(one(1, 2, 4, 8)), draw(one(1, 1, 2)), draw(one(1, 1, 2))
    stage = max(tensor * context, expert * expert_tensor) * copies
    experts, size = draw(one(1, 2, 4)) * expert, draw(one(1, 2, 4, 8))
    data, micro_batch = stage // (tensor * context), draw(one(1, 2, 3))
    kind = draw(one("gpipe", "1f1b", "zb_h1", "dualpipe", "interleaved"))
    virtual = {"virtual": 2} if kind == "interleaved" else {}
    flag = st.booleans()
    return {
        "name": "f",
        "model": draw(models(experts)),
        "routing": draw(routings(experts)),
        "capacity": draw(CAPACITIES),
        "placement": draw(placements(experts, expert)),
        "cluster": {
            "gpu": draw(one("a100", "h100", "h200", "b200")), "gpus_per_node": size,
            "nodes": -(-stage * pipeline // size) + draw(one(0, 0, 1)), "fabric": draw(fabrics()),
            **maybe(draw, price_per_gpu_hour=one(0, 1e-300, 1e6)),
        },
        "parallelism": {
            "data": data, "tensor": tensor, "context": context, "pipeline": pipeline,
            "expert": expert, "expert_tensor": expert_tensor, "schedule": {"kind": kind, **virtual},
            "zero": {"dense": draw(one(0, 0, 1, 2, 3)), "expert": draw(one(0, 0, 1, 2, 3))},
        },
        "workload": {
            "sequence_length": draw(one(16, 128, 2048)), "micro_batch": micro_batch,
            "global_batch": data * micro_batch * draw(one(1, 2, 8)),
            "precision": maybe(draw, gemm=one("bf16", "fp32", "fp8"), weights=one("fp32", "fp8"), master=one("fp32")),
            "recompute": draw(one("none", "full", "selective", ["swiglu"])),
            **maybe(draw, train_tokens=one(1, 1e12, 1e18), gradient_clipping=one(1e-9, 1e9)),
        },
        "dispatch": draw(DISPATCHES),
        "network": {"model": draw(one("ports", "fluid", "exact"))},
        "implementation": {"kind": draw(one("fused", "fused", "torch_eager"))},
        "uncertainty": {"samples": draw(one(1, 2, 3)), "bank": draw(one(1, 8))},
        "overlap": maybe(draw, shared_experts=flag, micro_batches=flag, gradient_reduction=flag),
        "memory": maybe(draw, reserved=one("0 B", "1 GB", "1 PB"), allocator_overhead=one(0.0, 1.0)),
        "seed": draw(one(0, 2**63, 10**30)),
        **maybe(draw, compute=one({"profile": "roofline"}, {"profile": "h200"})),
    }  # fmt: skip


def refused_in_one_line(error):
    line = str(error)
    assert not isinstance(error, InternalError), line
    assert len(line) <= LONGEST_LINE
    assert line.isprintable()
    assert ":" in line


def dumped(value):
    return yaml.safe_dump(value, allow_unicode=True, sort_keys=False)


def loaded(text):
    """The scenario in `text`, None when it is refused in one line; either comes soon."""
    begin = time.monotonic()
    try:
        scenario = load_scenario_text(text, source="f.yaml")
    except UserError as error:
        refused_in_one_line(error)
        scenario = None
    assert time.monotonic() - begin < SECONDS_TO_LOAD
    return scenario


def is_small(scenario: Scenario) -> bool:
    mesh, work = scenario.parallelism, scenario.workload
    runs = scenario.model.layers * scenario.num_micro_batches * mesh.stage_ranks * scenario.uncertainty.samples
    tokens = max(2**18, mesh.expert * work.micro_batch * work.sequence_length)
    group = mesh.expert if scenario.network.model == "ports" else mesh.expert**2 / 4
    return (
        runs <= SMALL_RUNS
        and tokens * scenario.model.top_k <= SMALL_ROWS
        and group <= MOST_RANKS
        and scenario.cluster.num_gpus <= 2_000
        and scenario.model.experts <= 1_000
        and not isinstance(scenario.routing, TrainRouting)
    )


def simulated(scenario):
    begin = time.monotonic()
    try:
        record = simulate(scenario)
    except UserError as error:
        refused_in_one_line(error)
    else:
        assert record.result["step_time_s"] > 0
        json_text(record.result)
        with redirect_stdout(io.StringIO()) as screen:
            print_facts(record.result)
        assert not {"nan", "inf"} & set(re.findall(r"[a-z]+", screen.getvalue()))
        with TemporaryDirectory() as folder:
            write_report(record, Path(folder) / "report.html")
    assert time.monotonic() - begin < SECONDS_TO_SIMULATE


def check(value):
    scenario = loaded(dumped(value))
    if scenario is not None:
        assert load_scenario_text(dump_scenario(scenario)) == scenario
        if is_small(scenario):
            simulated(scenario)


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@pytest.mark.usefixtures("few_tokens")
@settings(max_examples=40, **QUIET)
@given(mutated([plain(SMALL)]))
def test_a_mutated_small_scenario_is_simulated_or_refused_in_one_line(value):
    check(value)


@pytest.mark.usefixtures("few_tokens")
@settings(max_examples=8, **QUIET)
@given(coherent())
def test_extreme_numbers_within_bounds_are_simulated(value):
    check(value)


@settings(max_examples=60, **QUIET)
@given(mutated(SCENARIOS))
def test_a_mutated_shipped_scenario_loads_or_is_refused_in_one_line(value):
    loaded(dumped(value))


@settings(max_examples=40, **QUIET)
@given(mutated(PLANS))
def test_a_mutated_plan_loads_or_is_refused_in_one_line(tmp_path_factory, value):
    check_plan(value, tmp_path_factory.mktemp("plan"))


@settings(max_examples=40, **QUIET)
@given(mutated(SERVING))
def test_a_mutated_deployment_loads_or_is_refused_in_one_line(value):
    begin = time.monotonic()
    try:
        load_serving_text(dumped(value))
    except UserError as error:
        refused_in_one_line(error)
    assert time.monotonic() - begin < SECONDS_TO_LOAD


def check_plan(value, folder):
    file = folder / "plan.yaml"
    file.write_text(dumped(value), encoding="utf-8")
    begin = time.monotonic()
    try:
        load_any_plan(file)
    except UserError as error:
        refused_in_one_line(error)
    assert time.monotonic() - begin < SECONDS_TO_LOAD


def check_study(value, folder):
    file = folder / "study.yaml"
    base = value.get("base")
    if isinstance(base, str) and base.startswith("../"):
        value = {**value, "base": str(FOLDER / base[3:])}
    file.write_text(dumped(value), encoding="utf-8")
    begin = time.monotonic()
    try:
        load_study(file)
    except UserError as error:
        refused_in_one_line(error)
    assert time.monotonic() - begin < 3 * SECONDS_TO_LOAD


@settings(max_examples=20, **QUIET)
@given(value=mutated(STUDIES))
def test_a_mutated_study_loads_or_is_refused_in_one_line(tmp_path_factory, value):
    check_study(value, tmp_path_factory.mktemp("study"))


@st.composite
def torn(draw):
    """The text of a shipped file with lines doubled, moved, cut or filled with what no editor writes."""
    text = draw(st.sampled_from(sorted(FOLDER.glob("**/*.yaml")))).read_text(encoding="utf-8")
    lines = text.splitlines()
    for _ in range(draw(st.integers(1, 3))):
        first, second = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
        how = draw(st.sampled_from(["double", "swap", "cut", "junk", "indent"]))
        if how == "double":
            lines.insert(second, lines[first])
        elif how == "swap":
            lines[first], lines[second] = lines[second], lines[first]
        elif how == "cut":
            lines[first] = lines[first][: draw(st.integers(0, len(lines[first])))]
        elif how == "junk":
            junk = draw(st.sampled_from(["\t", "&a *a", "<<: *a", "!!python/object:x {}", "---", "? [", "\x07"]))
            lines[first] += junk
        else:
            lines[first] = " " * draw(st.integers(1, 9)) + lines[first]
    return "\n".join(lines)


@settings(max_examples=60, **QUIET)
@given(torn())
def test_a_torn_file_loads_or_is_refused_in_one_line(text):
    loaded(text)


LONG = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}


@pytest.mark.slow
@settings(max_examples=1500, **LONG)
@given(mutated([plain(SMALL)]))
def test_many_mutated_small_scenarios(value):
    check(value)


@pytest.mark.slow
@settings(max_examples=1000, **LONG)
@given(coherent())
def test_many_extreme_numbers_within_bounds(value):
    check(value)


@pytest.mark.slow
@settings(max_examples=1500, **LONG)
@given(mutated(SCENARIOS))
def test_many_mutated_shipped_scenarios(value):
    check(value)


@pytest.mark.slow
@settings(max_examples=1000, **LONG)
@given(value=st.one_of(mutated(PLANS)))
def test_many_mutated_plans(tmp_path_factory, value):
    check_plan(value, tmp_path_factory.mktemp("plan"))


@pytest.mark.slow
@settings(max_examples=200, **LONG)
@given(value=mutated(STUDIES))
def test_many_mutated_studies(tmp_path_factory, value):
    check_study(value, tmp_path_factory.mktemp("study"))


@pytest.mark.slow
@settings(max_examples=1000, **LONG)
@given(torn())
def test_many_torn_files(text):
    loaded(text)

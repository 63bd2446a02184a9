"""The catalogue: what it says of GPUs and models, and that a new entry is enough."""

import pickle
from types import MappingProxyType

import pytest

from moesim.errors import UserError, same_product
from moesim.kernels import Gemm
from moesim.kernels.loading import kernel_model
from moesim.kernels.profile import SHIPPED
from moesim.run import simulate
from moesim.scenario import Model, OwnGpu, catalogue, gpu_names, gpu_spec, model_names
from moesim.scenario.catalogue import model_preset

# FLOP of the 16-bit tensor cores per SM and clock, by architecture: what ties peak, SM count and clock together
FLOP_PER_SM_CLOCK = {
    **dict.fromkeys(("l40s", "rtx-pro-6000", "h20"), 1024),
    **dict.fromkeys(("a100", "a800", "mi300x"), 2048),
    **dict.fromkeys(("h100", "h800", "h200"), 4096),
    **dict.fromkeys(("b200", "gb200", "b300", "gb300"), 8192),
}
CUDA_CORES_PER_SM = {"a100": 64, "a800": 64, "h100": 128, "h800": 128, "h200": 128, "rtx-pro-6000": 128}
ROUNDED = {"l40s": 0.025}  # its data sheet quotes fp8 and tf32 at a higher clock than bf16


@pytest.mark.parametrize("name", gpu_names())
def test_the_peak_follows_from_sms_and_clock(name):
    spec = gpu_spec(name)
    assert spec.peak_flops["bf16"] == pytest.approx(FLOP_PER_SM_CLOCK[name] * spec.sm_count * spec.clock_hz, rel=2e-3)


@pytest.mark.parametrize("name", gpu_names())
def test_formats_relate_as_the_tensor_cores_do(name):
    peaks = gpu_spec(name).peak_flops
    rel = ROUNDED.get(name, 1e-3)
    assert peaks["fp16"] == peaks["bf16"] == pytest.approx(2 * peaks["tf32"], rel=rel)
    assert peaks.get("fp8", 2 * peaks["bf16"]) == pytest.approx(2 * peaks["bf16"], rel=rel)
    assert peaks["fp32"] < peaks["tf32"]


@pytest.mark.parametrize("name", gpu_names())
def test_every_gpu_names_its_sources(name):
    spec = gpu_spec(name)
    assert spec.source
    assert spec.price_source
    assert 0.5 < spec.price_per_gpu_hour < 15


def test_chips_that_share_silicon_share_their_compute():
    h100, h200, h800 = (gpu_spec(name) for name in ("h100", "h200", "h800"))
    assert h100.peak_flops == h200.peak_flops == h800.peak_flops
    assert h800.nvlink_bandwidth == 200e9
    assert h100.nvlink_bandwidth == h200.nvlink_bandwidth == 450e9
    assert h200.memory_bandwidth > h100.memory_bandwidth == h800.memory_bandwidth


@pytest.mark.parametrize(("name", "cores"), CUDA_CORES_PER_SM.items())
def test_fp32_is_two_flop_per_core_at_a_clock_near_boost(name, cores):
    spec = gpu_spec(name)
    clock = spec.peak_flops["fp32"] / (2 * cores * spec.sm_count)
    assert 0.99 <= clock / spec.clock_hz < 1.1


def test_a_spec_is_hashable_and_survives_a_process_boundary():
    spec = gpu_spec("h200")
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert hash(spec) == hash(gpu_spec("h200"))


@pytest.mark.parametrize("name", model_names())
def test_every_preset_is_a_whole_model_with_a_source(name):
    model = Model.model_validate(model_preset(name))
    assert model.source
    assert model.preset == name


def test_unknown_names_get_a_suggestion():
    with pytest.raises(UserError, match='unknown GPU "H200"; did you mean "h200"'):
        gpu_spec("H200")
    with pytest.raises(UserError, match='unknown model "mixtrl8x7b"; did you mean "mixtral-8x7b"'):
        model_preset("mixtrl8x7b")
    with pytest.raises(UserError, match="known: a100, h100"):
        gpu_spec("tpu")


@pytest.mark.parametrize(
    ("key", "value"), [("nvlink_bandwidth", 0), ("sm_count", -1), ("peak_flops", {"bf16": 1e300}), ("l2_bytes", True)]
)
def test_a_gpu_that_cannot_be_is_named(monkeypatch, key, value):
    entries = {"h100": {**catalogue.catalogue("gpus")["h100"], key: value}}
    monkeypatch.setattr(catalogue, "catalogue", lambda name: entries)
    with pytest.raises(UserError, match=rf"gpus.yaml: h100.{key}: must be between "):
        catalogue.gpu_spec.__wrapped__("h100")


@pytest.mark.parametrize("known", [gpu_names(), model_names()])
def test_no_gemm_is_proposed_for_another(known):
    for name in known:
        others = [other for other in known if other != name]
        assert same_product(name, others) is None
        assert same_product(name.upper().replace("-", "_"), known) == name
        changes = {f"{name}0", f"{name}.5", name.replace("2", "3", 1) + "1"} | (
            {f"{name}x"} if name[-1] in "0123" else set()
        )
        for changed in changes - set(known):
            assert same_product(changed, known) is None


@pytest.mark.parametrize("name", gpu_names())
def test_every_gpu_is_measured_or_scaled_from_a_measured_one(name):
    spec = gpu_spec(name)
    assert (SHIPPED / f"{spec.scaled_from or name}.json.gz").exists()
    source = kernel_model(name).seconds(Gemm(m=4096, k=4096, n=4096)).source
    is_known = (SHIPPED / f"{name}.json.gz").exists()  # by measurements or by published tables
    assert (source == "scaled") == (not is_known)


OWN = {"like": "h200", "name": "mine", "memory": "96 GB", "peak": {"bf16": "148 TFLOP/s"}, "price": 1.5}


def own(**changes):
    return OwnGpu.model_validate(OWN | changes)


def test_a_gpu_of_ones_own_has_what_it_gives_and_the_rest_of_what_it_is_like():
    spec, like = own().spec, gpu_spec("h200")
    assert (spec.memory_bytes, spec.peak_flops["bf16"], spec.price_per_gpu_hour) == (96e9, 148e12, 1.5)
    assert spec.memory_bandwidth == like.memory_bandwidth
    for dtype, peak in like.peak_flops.items():  # formats that it does not name keep their ratio to bf16
        assert spec.peak_flops[dtype] / spec.peak_flops["bf16"] == pytest.approx(peak / like.peak_flops["bf16"])
    assert own(peak={"fp8": "1 PFLOP/s"}).spec.peak_flops == {**like.peak_flops, "fp8": 1e15}


def test_the_same_figures_give_the_kernels_of_the_catalogue():
    h20 = gpu_spec("h20")
    peak = {dtype: f"{value!r} FLOP/s" for dtype, value in h20.peak_flops.items()}
    mine = own(like="h100", peak=peak, memory_bandwidth=f"{h20.memory_bandwidth!r} B/s").spec
    for sizes in ({"m": 8192, "k": 4096, "n": 4096}, {"m": 16, "k": 512, "n": 512}):
        assert kernel_model(mine).seconds(Gemm(**sizes)).seconds == kernel_model("h20").seconds(Gemm(**sizes)).seconds


def test_a_slower_gpu_of_ones_own_takes_longer_by_the_ratio_of_peaks():
    sizes = {"m": 8192, "k": 8192, "n": 8192}
    slow = kernel_model(own().spec).seconds(Gemm(**sizes))
    ratio = gpu_spec("h200").peak_flops["bf16"] / 148e12
    assert slow.source == "scaled"
    assert slow.seconds == pytest.approx(ratio * kernel_model("h200").seconds(Gemm(**sizes)).seconds, rel=0.01)


def test_a_gpu_of_ones_own_may_not_take_a_name_of_the_catalogue():
    with pytest.raises(ValueError, match='"h100" is a GPU of the catalogue'):
        own(name="h100")


def test_a_gpu_is_added_in_one_place(small, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """An H200 with twice of everything, and no profile of its own."""
    gpus = {name: dict(entry) for name, entry in catalogue.catalogue("gpus").items()}
    doubled = ("price_per_gpu_hour", "clock_hz", "memory_bandwidth", "memory_bytes")
    new = gpus["h200"] | {"like": "h200", "source": "a test"} | {key: 2 * gpus["h200"][key] for key in doubled}
    new["peak_flops"] = {name: 2 * peak for name, peak in gpus["h200"]["peak_flops"].items()}

    def scenario(name):
        return small(
            {"cluster": {"gpu": name, "nodes": 1, "gpus_per_node": 4}, "compute": {}, "uncertainty.samples": 1}
        )

    with pytest.raises(UserError, match='unknown GPU "doubled-h200"'):
        scenario("doubled-h200")
    request.addfinalizer(catalogue.gpu_spec.cache_clear)  # which would know it ever after
    files, read = {"gpus": MappingProxyType(gpus | {"doubled-h200": new})}, catalogue.catalogue
    monkeypatch.setattr(catalogue, "catalogue", lambda name: files.get(name) or read(name))
    plain, other = (simulate(scenario(name)).result for name in ("h200", "doubled-h200"))
    for part in ("experts", "attention", "permute", "embedding_head"):
        assert other["attribution_s"][part] < plain["attribution_s"][part]
    rent, double = (result["cost"]["usd_per_step"] / result["step_time_s"] for result in (plain, other))
    assert double == pytest.approx(2 * rent)
    capacities = [result["memory"]["capacity_bytes_by_pipeline_rank"][0] for result in (plain, other)]
    assert capacities[1] == 2 * capacities[0]
    assert "scaled" in other["estimate_sources"] and "scaled" not in plain["estimate_sources"]

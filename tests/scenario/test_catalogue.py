import pickle

import pytest

from moesim.errors import UserError
from moesim.scenario import Model, catalogue, gpu_names, gpu_spec, model_names
from moesim.scenario.catalogue import model_preset

# FLOP of the 16-bit tensor cores per SM and clock, by architecture: what ties peak, SM count and clock together
FLOP_PER_SM_CLOCK = {"a100": 2048, "h100": 4096, "h800": 4096, "h200": 4096, "b200": 8192, "gb200": 8192}
CUDA_CORES_PER_SM = {"a100": 64, "h100": 128, "h800": 128, "h200": 128}


@pytest.mark.parametrize("name", gpu_names())
def test_the_peak_follows_from_sms_and_clock(name):
    spec = gpu_spec(name)
    assert spec.peak_flops["bf16"] == pytest.approx(FLOP_PER_SM_CLOCK[name] * spec.sm_count * spec.clock_hz, rel=2e-3)


@pytest.mark.parametrize("name", gpu_names())
def test_formats_relate_as_the_tensor_cores_do(name):
    peaks = gpu_spec(name).peak_flops
    assert peaks["fp16"] == peaks["bf16"] == pytest.approx(2 * peaks["tf32"], rel=1e-3)
    assert peaks.get("fp8", 2 * peaks["bf16"]) == pytest.approx(2 * peaks["bf16"], rel=1e-3)
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
    assert 1.0 <= clock / spec.clock_hz < 1.1


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
    with pytest.raises(UserError, match='unknown model "mixtral-8x7"; did you mean "mixtral-8x7b"'):
        model_preset("mixtral-8x7")
    with pytest.raises(UserError, match="known: a100, h100"):
        gpu_spec("tpu")


@pytest.mark.parametrize(
    ("key", "value"), [("nvlink_bandwidth", 0), ("sm_count", -1), ("peak_flops", {"bf16": 1e300}), ("l2_bytes", True)]
)
def test_a_gpu_that_cannot_be_is_named(monkeypatch, key, value):
    entries = {"h100": {**catalogue._catalogue("gpus")["h100"], key: value}}
    monkeypatch.setattr(catalogue, "_catalogue", lambda name: entries)
    with pytest.raises(UserError, match=rf"gpus.yaml: h100.{key}: must be between "):
        catalogue.gpu_spec.__wrapped__("h100")

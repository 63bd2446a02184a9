"""A software is an entry of one table: a new one runs, and changes what its facts say."""

from dataclasses import replace

import pytest

from moesim.errors import UserError
from moesim.program.software import KERNEL_LISTS
from moesim.run import simulate
from moesim.scenario import require_supported
from moesim.scenario.software import FUSED, SOFTWARE


def test_a_software_with_one_other_fact_is_added_in_one_place(small, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = replace(FUSED, name="exact_head", switches=replace(FUSED.switches, loss="fp32"))
    with pytest.raises(UserError, match="fused"):
        small({"implementation.kind": exact.name})
    monkeypatch.setitem(SOFTWARE, exact.name, exact)
    large = {"model.vocab": 65_536}  # the step's peak is in the loss
    plain, other = (simulate(small({**large, "implementation.kind": name})).result for name in ("fused", exact.name))
    assert other["step_time_s"] > plain["step_time_s"]
    assert other["memory"]["peak_bytes"] > plain["memory"]["peak_bytes"]


@pytest.mark.parametrize(
    ("fact", "changes"),
    [
        ("shards_gradients", {"parallelism": {"data": 4, "expert": 2, "zero": {"dense": 2, "expert": 2}}}),
        ("shares_layers", {"parallelism": {"data": 2, "tensor": 2, "expert": 2}}),
        ("recomputes_parts", {"workload.recompute": ["rms_norm"]}),
        ("overlaps", {"overlap": {"gradient_reduction": True}}),
    ],
)
def test_what_a_software_cannot_do_is_refused_by_name(
    small, monkeypatch: pytest.MonkeyPatch, fact: str, changes
) -> None:
    changes = {"workload.recompute": "none", **changes}
    lacking = replace(FUSED, name="lacking", **{fact: False})
    monkeypatch.setitem(SOFTWARE, lacking.name, lacking)
    require_supported(small(changes))
    with pytest.raises(UserError, match="lacking"):
        require_supported(small({**changes, "implementation.kind": lacking.name}))


def test_every_software_has_a_list_of_kernels() -> None:
    assert {facts.kernels for facts in SOFTWARE.values()} == set(KERNEL_LISTS)
    assert all(name == facts.name for name, facts in SOFTWARE.items())


def test_a_software_is_named_by_a_word_or_by_its_kind(small) -> None:
    for name in SOFTWARE:
        assert small({"implementation": name}) == small({"implementation": {"kind": name}})

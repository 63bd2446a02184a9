"""The JSON Schema of serving scenarios, for editors and the documentation."""

from typing import Any

from moesim.scenario.loader import accept_cluster_forms, accept_model_forms, finished_schema
from moesim.serving.schema import ServingScenario


def serving_json_schema(*, units: bool = False) -> dict[str, Any]:
    """JSON Schema (2020-12) of the sections, with the short forms of a model; `units` as in that of a scenario."""
    schema = ServingScenario.model_json_schema(mode="validation")
    accept_model_forms(schema["$defs"]["Model"])
    accept_cluster_forms(schema["$defs"])
    return finished_schema(schema, title="moesim serving", units=units)

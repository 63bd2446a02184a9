"""The JSON Schema of plan files, for editors: that of the sections plus the short forms that files may use."""

from typing import Any

from moesim.planner.plan import Plan
from moesim.scenario.catalogue import gpu_names
from moesim.scenario.json_schema import accept_model_forms, accept_named_implementation, without_units


def plan_json_schema(*, units: bool = False) -> dict[str, Any]:
    """JSON Schema (2020-12) that accepts every form that `load_plan` accepts at the level of single sections.

    `units`: as in the schema of a scenario.
    """
    schema = Plan.model_json_schema(mode="validation")
    accept_model_forms(schema["$defs"]["Model"])
    accept_named_implementation(schema)
    schema["$defs"]["Offer"]["properties"]["gpu"]["enum"] = list(gpu_names())
    if not units:
        schema = without_units(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "moesim plan"}

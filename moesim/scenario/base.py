"""The strict building blocks of every scenario section: frozen, no unknown keys, no silent conversion."""

from typing import Annotated, Literal

from pydantic import AllowInfNan, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, Strict, WithJsonSchema

from moesim.units import parse_bandwidth, parse_bytes, parse_seconds

DType = Literal["fp32", "bf16", "fp16", "fp8"]
BYTES_PER_ELEMENT: dict[str, float] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


class Section(BaseModel):
    """A frozen mapping that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


PositiveInt = Annotated[int, Strict(), Field(gt=0)]
Count = Annotated[int, Strict(), Field(ge=0)]
PositiveFloat = Annotated[float, Strict(), AllowInfNan(False), Field(gt=0)]
NonNegativeFloat = Annotated[float, Strict(), AllowInfNan(False), Field(ge=0)]
Share = Annotated[float, Strict(), AllowInfNan(False), Field(ge=0, le=1)]
Flag = Annotated[bool, Strict()]


def _text(example: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "examples": [example]})


# Quantities are texts with a unit in the file and SI numbers inside; dumping writes the text again, exact to the bit.
Bandwidth = Annotated[
    float, BeforeValidator(parse_bandwidth), Field(gt=0), PlainSerializer(lambda v: f"{v!r} B/s"), _text("400 Gbps")
]
Latency = Annotated[float, BeforeValidator(parse_seconds), PlainSerializer(lambda v: f"{v!r} s"), _text("3.3 us")]
Bytes = Annotated[float, BeforeValidator(parse_bytes), PlainSerializer(lambda v: f"{v!r} B"), _text("141 GB")]

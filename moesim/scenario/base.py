"""The strict building blocks of every scenario section: frozen, no unknown keys, no silent conversion.

Every number has bounds: wide enough for any machine or model that will be built, narrow enough that sums and products
of them stay finite, and that a slip of the keyboard is a message and not hours of work or gigabytes.
"""

from collections.abc import Callable, Collection
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    AllowInfNan,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    Strict,
    WithJsonSchema,
)
from pydantic_core import PydanticKnownError

from moesim.units import (
    format_bandwidth,
    format_bytes,
    format_flop_rate,
    format_hertz,
    format_seconds,
    parse_bandwidth,
    parse_bytes,
    parse_flop_rate,
    parse_hertz,
    parse_seconds,
)

DType = Literal["fp32", "bf16", "fp16", "fp8"]
GemmFormat = Literal["fp32", "bf16", "fp16", "fp8", "fp4"]
BYTES_PER_ELEMENT: dict[str, float] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}

MOST_GPUS = 65_536  # the fabric of as many takes seconds and half a gigabyte
MOST_EXPERTS = 2**15 - 1  # traces keep the number of an expert in 16 bits, and one more value for none
MOST_LAYERS = 1_000
SLOWEST_LINK, FASTEST_LINK = 1e3, 1e18  # bytes/s
LONGEST_LATENCY = 1.0  # seconds
MOST_MEMORY = 1e15  # bytes of one GPU
LEAST_SHARE = 1e-3  # of a link's bandwidth: less is no link


class Section(BaseModel):
    """A frozen mapping that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def one_of(table: Collection[str]) -> AfterValidator:
    """Text must be a name in the table as it is when a file is read; otherwise the user is told its names."""

    def known(name: str) -> str:
        if name not in table:
            raise PydanticKnownError("literal_error", {"expected": " or ".join(map(repr, table))})
        return name

    return AfterValidator(known)


def _unit(name: str) -> dict[str, JsonValue]:
    """Of a plain number, for the reference of the documentation; the JSON Schema for editors goes without."""
    return {"unit": name}


Seed = Annotated[int, Strict(), Field(ge=0)]
PositiveFloat = Annotated[float, Strict(), AllowInfNan(False), Field(ge=1e-9, le=1e9)]
Share = Annotated[float, Strict(), AllowInfNan(False), Field(ge=0, le=1, json_schema_extra=_unit("share"))]
Flag = Annotated[bool, Strict()]
Text = Annotated[str, Field(max_length=1_000)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
FILE_NAME = r"^[A-Za-z0-9._-]+$"
FileName = Annotated[str, Field(min_length=1, max_length=200, pattern=FILE_NAME)]

Gpus = Annotated[int, Strict(), Field(gt=0, le=MOST_GPUS)]
Index = Annotated[int, Strict(), Field(ge=0, lt=MOST_GPUS)]
GpusPerNode = Annotated[int, Strict(), Field(gt=0, le=1_024)]
Experts = Annotated[int, Strict(), Field(ge=0, le=MOST_EXPERTS)]
PositiveExperts = Annotated[int, Strict(), Field(gt=0, le=MOST_EXPERTS)]
Layers = Annotated[int, Strict(), Field(ge=0, le=MOST_LAYERS)]
PositiveLayers = Annotated[int, Strict(), Field(gt=0, le=MOST_LAYERS)]
Heads = Annotated[int, Strict(), Field(gt=0, le=4_096)]
Width = Annotated[int, Strict(), Field(ge=0, le=2**20, json_schema_extra=_unit("elements"))]
PositiveWidth = Annotated[int, Strict(), Field(gt=0, le=2**20, json_schema_extra=_unit("elements"))]
# Of one sequence, of one training step, of a trace.
Tokens = Annotated[int, Strict(), Field(gt=0, le=2**24, json_schema_extra=_unit("tokens"))]
Sequences = Annotated[int, Strict(), Field(gt=0, le=2**20, json_schema_extra=_unit("sequences"))]
Samples = Annotated[int, Strict(), Field(gt=0, le=1_000)]
TrainTokens = Annotated[float, Strict(), AllowInfNan(False), Field(ge=1, le=1e18, json_schema_extra=_unit("tokens"))]
TokensPerSecond = Annotated[
    float, Strict(), AllowInfNan(False), Field(ge=1e-6, le=1e15, json_schema_extra=_unit("tokens/s"))
]
Usd = Annotated[float, Strict(), AllowInfNan(False), Field(ge=1e-6, le=1e15, json_schema_extra=_unit("USD"))]
Rent = Annotated[float, Strict(), AllowInfNan(False), Field(ge=0, le=1e6, json_schema_extra=_unit("USD/h"))]
PositiveRent = Annotated[float, Strict(), AllowInfNan(False), Field(ge=1e-6, le=1e6, json_schema_extra=_unit("USD/h"))]
CapacityFactor = Annotated[float, Strict(), AllowInfNan(False), Field(ge=1e-3, le=1e5)]
Coefficient = Annotated[float, Strict(), AllowInfNan(False), Field(ge=0, le=1e3)]
Efficiency = Annotated[float, Strict(), AllowInfNan(False), Field(ge=LEAST_SHARE, le=1)]
BandwidthFactor = Annotated[float, Strict(), AllowInfNan(False), Field(ge=1e-3, le=1e3)]
Oversubscribed = Annotated[float, Strict(), AllowInfNan(False), Field(ge=1e-3, le=1e3)]


def _zero_or_between(least: float, most: float, why: str) -> Callable[[float], float]:
    def check(value: float) -> float:
        if value != 0 and not least <= value <= most:
            raise ValueError(f"must be 0 ({why}), or between {least:g} and {most:g}, got {value!r}")
        return value

    return check


LinkFactor = Annotated[Share, AfterValidator(_zero_or_between(LEAST_SHARE, 1, "failed"))]
Popularity = Annotated[
    float,
    Strict(),
    AllowInfNan(False),
    Field(ge=0),
    AfterValidator(_zero_or_between(1e-12, 1e12, "never chosen")),
]


def _text(example: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "examples": [example]})


def _between(least: float, most: float, shown: Callable[[float], str], value: float) -> float:
    if not least <= value <= most:
        raise ValueError(f"must be between {shown(least)} and {shown(most)}, got {value:g} {shown(0).split()[1]}")
    return value


def link_bandwidth(value: object) -> float:
    """Bytes/s of a text such as "400 Gbps". Raises ValueError for what is no bandwidth of a link."""
    return _between(SLOWEST_LINK, FASTEST_LINK, format_bandwidth, parse_bandwidth(value))


def link_latency(value: object) -> float:
    """Seconds of a text such as "3.3 us". Raises ValueError for what is no latency of a link."""
    return _between(0, LONGEST_LATENCY, format_seconds, parse_seconds(value))


def _reserved(value: object) -> float:
    return _between(0, MOST_MEMORY, format_bytes, parse_bytes(value))


def _memory(value: object) -> float:
    return _between(1e6, MOST_MEMORY, format_bytes, parse_bytes(value))


def _memory_bandwidth(value: object) -> float:
    return _between(1e6, 1e17, format_bandwidth, parse_bandwidth(value))


def _flop_rate(value: object) -> float:
    return _between(1e9, 1e20, format_flop_rate, parse_flop_rate(value))


def _clock(value: object) -> float:
    return _between(1e8, 1e10, format_hertz, parse_hertz(value))


# Quantities are texts with a unit in the file and SI numbers inside; dumping writes the text again, exact to the bit.
Bandwidth = Annotated[
    float, BeforeValidator(link_bandwidth), PlainSerializer(lambda v: f"{v!r} B/s"), _text("400 Gbps")
]
Latency = Annotated[float, BeforeValidator(link_latency), PlainSerializer(lambda v: f"{v!r} s"), _text("3.3 us")]
Bytes = Annotated[float, BeforeValidator(_reserved), PlainSerializer(lambda v: f"{v!r} B"), _text("3.6 GB")]
Memory = Annotated[float, BeforeValidator(_memory), PlainSerializer(lambda v: f"{v!r} B"), _text("141 GB")]
MemoryBandwidth = Annotated[
    float, BeforeValidator(_memory_bandwidth), PlainSerializer(lambda v: f"{v!r} B/s"), _text("4.8 TB/s")
]
FlopRate = Annotated[
    float, BeforeValidator(_flop_rate), PlainSerializer(lambda v: f"{v!r} FLOP/s"), _text("989 TFLOP/s")
]
Clock = Annotated[float, BeforeValidator(_clock), PlainSerializer(lambda v: f"{v!r} Hz"), _text("1500 MHz")]

"""The `implementation` section: which software is simulated, by its name alone or as a mapping with its kind."""

from typing import Annotated

from pydantic import Field, WithJsonSchema

from moesim.scenario.base import Section, one_of
from moesim.scenario.software import FUSED, SOFTWARE, SoftwareFacts

SoftwareName = Annotated[str, one_of(SOFTWARE), WithJsonSchema({"enum": list(SOFTWARE), "type": "string"})]


class Implementation(Section):
    """Which software is simulated: one of the table `moesim.scenario.software.SOFTWARE`."""

    kind: SoftwareName = Field(
        default=FUSED.name,
        description="; ".join(f"{facts.name}: {facts.about}" for facts in SOFTWARE.values()) + ".",
    )

    @property
    def software(self) -> SoftwareFacts:
        """The facts of the software."""
        return SOFTWARE[self.kind]


AnyImplementation = Implementation  # what the key takes; forms of another kind join here as a union

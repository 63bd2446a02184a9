"""Links that are slow or have failed."""

from pydantic import Field

from moesim.scenario.base import Index, LinkFactor, Name, Section


class Degraded(Section):
    """A link, node or rail whose bandwidth is multiplied by `factor`."""

    link: tuple[Name, Name] | None = Field(default=None, description="One directed link by the names of its two ends.")
    node: Index | None = Field(default=None, description="All links of this node, counted from 0.")
    rail: Index | None = Field(
        default=None, description="The network links of the GPUs with this index in their nodes."
    )
    factor: LinkFactor = Field(description="Share of the bandwidth that is left; 0: the links have failed.")

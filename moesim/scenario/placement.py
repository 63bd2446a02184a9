"""The `placement` section: which rank of an expert-parallel group holds which experts, and copies of which.

A slot is a place for one expert on one rank; a group has as many slots as experts and copies. Slots are numbered rank
by rank. Every section knows how many slots a rank has, and lists the experts of all slots where it needs no trace.
Legend: E experts, Z slots of all ranks, R ranks of the group.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from moesim.scenario.base import MOST_EXPERTS, MOST_GPUS, Coefficient, Experts, Flag, PositiveFloat, Section, Text
from moesim.scenario.placement_files import PlacementFile, read_placement

Slots = list[list[int]]  # the experts of every rank
Speeds = Annotated[tuple[PositiveFloat, ...], Field(min_length=1, max_length=MOST_GPUS)]


class _Placement(Section):
    """What all placements have."""

    split: Literal["even", "nearest", "weighted"] = Field(
        default="even",
        description="How the rows of an expert with copies split over them. even: a rank's rows go to all copies in "
        "turn; nearest: in turn to the copies on the rank's own node, where there are any; weighted: to each copy its "
        "share, by weights of an explicit map, or such that the rows that experts are placed by load ranks evenly.",
    )

    judged_on: Literal["all", "later"] = Field(
        default="all",
        description="Sequences of the trace that are simulated. later: the second half alone, to compare with a "
        "placement that is made from the first half, which always leaves that half out.",
    )

    @property
    def held_back(self) -> bool:
        """Whether the first half of the trace is not simulated."""
        return self.judged_on == "later"

    def fixed_slots(self, *, num_experts: int, num_ranks: int) -> Slots | None:
        """The experts of every rank in every layer alike; None where layers differ."""
        return None

    def slots_of_ranks(self, *, num_experts: int, num_ranks: int) -> list[int]:
        """How many slots each rank has."""
        raise NotImplementedError


class _Redundant(_Placement):
    """A placement that is asked for copies by number."""

    redundant_experts: Experts = Field(
        default=0, description="Copies beyond the first one of every expert, in each layer and expert group."
    )

    def slots_of_ranks(self, *, num_experts: int, num_ranks: int) -> list[int]:
        """As many on each rank."""
        return [(num_experts + self.redundant_experts) // num_ranks] * num_ranks


class Contiguous(_Redundant):
    """Slot x holds expert x mod E: rank r of an EP group has experts r*E/R .. (r+1)*E/R - 1 where none has a copy."""

    kind: Literal["contiguous"] = Field(default="contiguous", description="Neighbouring experts on each rank.")

    def fixed_slots(self, *, num_experts: int, num_ranks: int) -> Slots:
        """The experts of every rank."""
        per_rank = (num_experts + self.redundant_experts) // num_ranks
        return [[x % num_experts for x in range(r * per_rank, (r + 1) * per_rank)] for r in range(num_ranks)]


class RoundRobin(_Redundant):
    """Experts are dealt to the ranks in turn, expert e to rank e mod R, then copies, one rank further each round."""

    kind: Literal["round_robin"] = Field(description="Expert e on rank e mod parallelism.expert.")

    def fixed_slots(self, *, num_experts: int, num_ranks: int) -> Slots:
        """The experts of every rank."""
        held: Slots = [[] for _ in range(num_ranks)]
        for x in range(num_experts + self.redundant_experts):
            # Where whole rounds end with the last expert a copy would else meet its expert on one rank.
            further = x // num_experts if num_experts % num_ranks == 0 else 0
            held[(x + further) % num_ranks].append(x % num_experts)
        return held


class Explicit(_Placement):
    """The experts of every rank, one by one: one list for all layers, or a file with a map of every layer."""

    kind: Literal["explicit"] = Field(description="A list of experts for each rank.")
    slots: Annotated[tuple[tuple[Experts, ...], ...], Field(max_length=MOST_EXPERTS)] | None = Field(
        default=None,
        description="One list of experts per rank of an expert-parallel group, each expert once or more.",
    )
    weights: Annotated[tuple[tuple[Coefficient, ...], ...], Field(max_length=MOST_EXPERTS)] | None = Field(
        default=None,
        description="With split: weighted, one number per slot: an expert's rows go to its slots in proportion.",
    )
    file: Text | None = Field(
        default=None,
        description="A map of every layer: SGLang's expert location or vLLM's maps (JSON, physical_to_logical_map), "
        "vLLM Ascend's expert map (layer_list), or TensorRT-LLM's moe_load_balancer.yaml (initial_global_assignments); "
        "path relative to this file.",
    )

    def read_file(self) -> "PlacementFile":
        """The maps of the file. Raises UserError where it is none."""
        assert self.file is not None, "the scenario's checks ask for one of slots and file"
        return read_placement(Path(self.file))

    def fixed_slots(self, *, num_experts: int, num_ranks: int) -> Slots | None:
        """The list, where it holds for all layers."""
        return None if self.slots is None else [list(experts) for experts in self.slots]

    def slots_of_ranks(self, *, num_experts: int, num_ranks: int) -> list[int]:
        """As the list says; those of a file are spread evenly."""
        if self.slots is None:
            return [self.read_file().num_slots // num_ranks] * num_ranks
        return [len(experts) for experts in self.slots]


class MadeFromRows(_Redundant):
    """A placement that is made from the rows of a trace, layer by layer."""

    made_on: Literal["earlier", "same"] = Field(
        default="earlier",
        description="Rows that the placement is made from. earlier: the first half of the trace's sequences, while "
        "the step is simulated with the second half; same: those that are simulated, which flatters it.",
    )

    @property
    def held_back(self) -> bool:
        """Whether the first half of the trace is not simulated."""
        return self.made_on == "earlier" or self.judged_on == "later"

    @property
    def ranks_equal(self) -> bool:
        """Whether experts that are placed together might be on any rank, so that layers differ in which."""
        return True

    @property
    def steps_ago(self) -> float:
        """Training steps since the experts were placed, where they are placed again and again; else 0."""
        return 0.0

    @property
    def rank_speeds(self) -> tuple[float, ...] | None:
        """The speeds of an expert group's ranks that the section states."""
        return None

    @property
    def heeds_speeds(self) -> bool:
        """Whether rows are placed by the speeds of ranks, the stated ones or else the cluster's."""
        return False


class MadeFromCounts(MadeFromRows):
    """One that looks at rows of experts alone, not at tokens: a trace keeps them of many training steps."""

    every: Annotated[int, Field(strict=True, gt=0, le=10**9)] | None = Field(
        default=None,
        description="Place the experts anew every so many training steps, by the rows that the trace recorded along "
        "the training: the step is simulated as long after the last placing as it is in the mean; placement.replacing "
        "of the result says what moving the experts costs. Absent: placed once, by the simulated router's own rows.",
    )

    @property
    def steps_ago(self) -> float:
        """The mean over the steps from one placing to the next, which are 1 to `every` steps behind it."""
        return 0.0 if self.every is None else (self.every + 1) / 2


class Eplb(MadeFromCounts):
    """DeepSeek's load balancer: the experts with most rows get copies, ranks equal loads."""

    kind: Literal["eplb"] = Field(description="Balanced by DeepSeek's EPLB from the rows of the trace.")
    policy: Literal["auto", "global"] = Field(
        default="auto",
        description="auto: hierarchical where the router's groups divide among the group's nodes, which then keep "
        "whole groups; global: copies and ranks are chosen over all nodes.",
    )


class _HeedsSpeeds(MadeFromRows):
    """A placement that gives slow ranks less."""

    speeds: Speeds | None = Field(default=None, description="Speed of every rank of an expert group.")

    @property
    def rank_speeds(self) -> tuple[float, ...] | None:
        """As given."""
        return self.speeds

    @property
    def heeds_speeds(self) -> bool:
        """It does."""
        return True


class BySpeed(_HeedsSpeeds, MadeFromCounts):
    """As EPLB's global policy, with rows in proportion to each rank's speed."""

    kind: Literal["by_speed"] = Field(description="Rows of a rank in proportion to its speed.")
    speeds: Speeds | None = Field(
        default=None,
        description="Speed of every rank of an expert group against the others', such as 1.0 and 0.7; absent: as the "
        "pools' kinds of GPU and cluster.speeds have it.",
    )

    @property
    def ranks_equal(self) -> bool:
        """A slow rank keeps its experts."""
        return False


class Search(_HeedsSpeeds):
    """Local search from EPLB's and from neighbouring experts, traffic counted."""

    kind: Literal["search"] = Field(
        description="Found by exchanging experts while a layer is estimated to get faster, traffic included."
    )
    tries: Annotated[int, Field(strict=True, ge=0, le=1_000_000)] = Field(
        default=4_000, description="Exchanges that are tried in each layer of the trace, from each of both starts."
    )
    speeds: Speeds | None = Field(
        default=None, description="Speed of every rank of an expert group; absent: the cluster's, as by_speed has it."
    )
    traffic: Coefficient | None = Field(
        default=None, description="Weight of tokens' copies beside rows in that estimate; absent: 1, or as measured."
    )
    measured: Flag = Field(
        default=False,
        description="Search with several weights of traffic, simulate a step of each on the rows that experts are "
        "placed by, and take the fastest; of no account where traffic is given.",
    )


Placement = Annotated[Contiguous | RoundRobin | Explicit | Eplb | BySpeed | Search, Field(discriminator="kind")]


def keeps_groups(slots: Sequence[Sequence[int]], *, num_groups: int) -> bool:
    """Whether a placement (`slots[r]`: the experts of rank r, equally many on each) keeps a router's groups together.

    Together means: every rank holds whole groups, or every group fills whole consecutive ranks.
    """
    per_rank, group_size = len(slots[0]), len(slots) * len(slots[0]) // num_groups
    groups = [{expert // group_size for expert in experts} for experts in slots]
    if per_rank >= group_size:
        return all(len(held) * group_size == per_rank for held in groups)
    if group_size % per_rank or any(len(held) > 1 for held in groups):
        return False
    ranks_per_group = group_size // per_rank
    blocks = [groups[first : first + ranks_per_group] for first in range(0, len(groups), ranks_per_group)]
    return all(len(set.union(*block)) == 1 for block in blocks)

"""What more than one router shows or asks for: types of fields, a flavor's body, an overhead model."""

from typing import Annotated

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field

from hostler_capacity import flavor as flavors
from hostler_capacity import overhead as overheads
from hostler_capacity.resources import ResourceClass
from hostler_common import db, errors, http

PoolDep = Annotated[db.Pool, http.state("pool")]

Amount = Annotated[int, Field(ge=0, le=2**48)]
Name = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f/]+$")]
Limit = Annotated[int, Query(ge=1, le=1000)]


class Body(BaseModel):
    """A request of ours: what it does not know is a mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FlavorBody(Body):
    """What a flavor is; `name` is in the path where it is replaced."""

    memory_mb: Annotated[int, Field(ge=1, le=2**48)]
    vcpus: Annotated[int, Field(ge=1, le=2**31)]
    disk_gb: Amount = 0
    extra: dict[Name, Amount] = Field(
        default_factory=dict, description="Further resource classes, such as disk_iops."
    )
    vm_type: str | None = Field(
        None, max_length=32, description="pv, hvm, pvh: where the hypervisor's overhead asks."
    )
    kind: flavors.Kind = flavors.Kind.GUEST
    match: flavors.Match = flavors.Match.EXACT

    def flavor(self, name: str) -> flavors.Flavor:
        """Return the domain's flavor.

        Raises:
            Invalid: it says one thing twice.
        """
        try:
            return flavors.Flavor(
                name=name,
                memory_mb=self.memory_mb,
                vcpus=self.vcpus,
                disk_gb=self.disk_gb,
                extra={ResourceClass(key): amount for key, amount in self.extra.items()},
                vm_type=self.vm_type,
                kind=self.kind,
                match=self.match,
            )
        except ValueError as exc:
            raise errors.Invalid(str(exc)) from exc


class EvidenceView(BaseModel):
    """How a model stands against one set of measurements.

    `raw` is the published formula, `charged` what a claim pays: that, rounded up to a whole MB.
    """

    dataset: str
    rows: int
    exact_rows: int
    under_rows_raw: int
    max_under_mb_raw: float
    under_rows_charged: int
    max_under_mb_charged: float
    max_over_mb_charged: float


class ModelView(BaseModel):
    """An overhead model. `under_predicts` models are shown, and refused as a default."""

    id: str
    version: int
    title: str
    source: str
    hypervisor_types: list[str]
    default_for: list[str]
    under_predicts: bool
    evidence: list[EvidenceView]


def model_view(catalogue: overheads.Catalogue, model: overheads.Model) -> ModelView:
    """Return a model with what is known of it."""
    return ModelView(
        id=model.id,
        version=model.version,
        title=model.title,
        source=model.source,
        hypervisor_types=list(model.hypervisor_types),
        default_for=sorted(name for name, used in catalogue.defaults.items() if used == model.id),
        under_predicts=catalogue.shortfall(model) is not None,
        evidence=[
            EvidenceView(
                dataset=found.dataset,
                rows=found.rows,
                exact_rows=found.exact_rows,
                under_rows_raw=found.under_rows_raw,
                max_under_mb_raw=float(found.max_under_mb_raw),
                under_rows_charged=found.under_rows_charged,
                max_under_mb_charged=float(found.max_under_mb_charged),
                max_over_mb_charged=float(found.max_over_mb_charged),
            )
            for found in catalogue.evidence(model)
        ],
    )

"""Overhead models: how much memory a hypervisor spends on a guest beside the guest's own.

Models are data (`data/models.json`): an id that never changes its meaning, a version, terms per
category of guest, rounding and an envelope. They are evaluated in exact rational arithmetic, so
that a model which equals its measurements says so to the megabyte.

Invariant: what a guest is charged is a whole number of MiB, never less than the model says, and a
model that is known to charge less than was measured is never what a host is priced with unasked.
A mean fit is below about half of its own data, which is how hosts end up oversubscribed.
"""

import csv
import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fractions import Fraction
from importlib import resources
from typing import Any, Final, NewType

ModelId = NewType("ModelId", str)
DataSetId = NewType("DataSetId", str)

ANY_TYPE: Final = "*"


class UnsafeModelError(ValueError):
    """A model was asked to be a default although it under-predicts what was measured."""


class UnknownModelError(LookupError):
    """No model of that id is shipped."""


class Rounding(StrEnum):
    """What happens to a fraction of a MiB."""

    NONE = "none"
    CEIL = "ceil"
    FLOOR = "floor"

    def apply(self, value: Fraction) -> Fraction:
        """Return `value` rounded this way."""
        match self:
            case Rounding.NONE:
                return value
            case Rounding.CEIL:
                return Fraction(math.ceil(value))
            case Rounding.FLOOR:
                return Fraction(math.floor(value))


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One summand: a plane over memory and vCPUs, rounded on its own, with a floor."""

    base_mb: Fraction = Fraction(0)
    per_memory_mb: Fraction = Fraction(0)
    per_vcpu_mb: Fraction = Fraction(0)
    rounding: Rounding = Rounding.NONE
    minimum_mb: Fraction = Fraction(0)

    def value(self, memory_mb: Fraction, vcpus: int) -> Fraction:
        """Return the term's share of the overhead in MiB."""
        plane = self.base_mb + self.per_memory_mb * memory_mb + self.per_vcpu_mb * vcpus
        return max(self.minimum_mb, self.rounding.apply(plane))


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A named, versioned formula. `categories` has one list of terms for each kind of guest."""

    id: ModelId
    version: int
    title: str
    source: str
    hypervisor_types: tuple[str, ...]
    categories: Mapping[str, tuple[Term, ...]]
    default_category: str
    rounding: Rounding
    envelope_mb: Fraction = Fraction(0)

    def predict(
        self, memory_mb: int | Fraction, vcpus: int, vm_type: str | None = None
    ) -> Fraction:
        """Return the overhead in MiB as the model's authors would have written it down.

        A guest of a category the model does not know is taken for the default one.
        """
        terms = self.categories.get(vm_type or "", self.categories[self.default_category])
        memory = Fraction(memory_mb)
        total = sum((term.value(memory, vcpus) for term in terms), self.envelope_mb)
        return self.rounding.apply(total)

    def price_mb(self, memory_mb: int | Fraction, vcpus: int, vm_type: str | None = None) -> int:
        """Return what a guest is charged: the prediction, rounded up to a whole MiB."""
        return math.ceil(self.predict(memory_mb, vcpus, vm_type))

    @property
    def counts_vcpus(self) -> bool:
        """True where the overhead depends on the number of vCPUs."""
        return any(term.per_vcpu_mb for terms in self.categories.values() for term in terms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One guest whose overhead was read off its hypervisor; None where nobody wrote it down."""

    memory_mb: Fraction
    vcpus: int | None
    vm_type: str | None
    overhead_mb: Fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """Measurements of one hypervisor, from one source."""

    id: DataSetId
    title: str
    hypervisor_type: str
    rows: tuple[Measurement, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """How a model stands against one data set.

    `raw` counts the formula as published, `charged` what a claim pays (rounded up).
    `exact_rows` counts the rows that equal the formula for some category of guest.
    """

    dataset: DataSetId
    rows: int
    exact_rows: int
    under_rows_raw: int
    max_under_mb_raw: Fraction
    under_rows_charged: int
    max_under_mb_charged: Fraction
    max_over_mb_charged: Fraction


def evaluate(model: Model, dataset: DataSet) -> Evidence | None:
    """Return how `model` compares with what was measured; None where the two cannot be compared.

    They cannot if the model needs vCPUs and the data set does not have them.
    """
    if model.counts_vcpus and any(row.vcpus is None for row in dataset.rows):
        return None
    raw: list[Fraction] = []
    charged: list[Fraction] = []
    exact = 0
    for row in dataset.rows:
        vcpus = row.vcpus or 0
        raw.append(row.overhead_mb - model.predict(row.memory_mb, vcpus, row.vm_type))
        charged.append(row.overhead_mb - model.price_mb(row.memory_mb, vcpus, row.vm_type))
        candidates = model.categories if row.vm_type is None else (row.vm_type,)
        exact += any(
            model.predict(row.memory_mb, vcpus, category) == row.overhead_mb
            for category in candidates
        )
    return Evidence(
        dataset=dataset.id,
        rows=len(dataset.rows),
        exact_rows=exact,
        under_rows_raw=sum(short > 0 for short in raw),
        max_under_mb_raw=max(Fraction(0), *raw),
        under_rows_charged=sum(short > 0 for short in charged),
        max_under_mb_charged=max(Fraction(0), *charged),
        max_over_mb_charged=max(Fraction(0), *(-short for short in charged)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """Every model this process knows, what was measured, and which model prices which host."""

    models: Mapping[ModelId, Model]
    datasets: Sequence[DataSet]
    defaults: Mapping[str, ModelId]
    _evidence: Mapping[ModelId, tuple[Evidence, ...]] = field(repr=False)

    def get(self, model_id: str) -> Model:
        """Return the model of that id.

        Raises:
            UnknownModelError: there is none.
        """
        model = self.models.get(ModelId(model_id))
        if model is None:
            raise UnknownModelError(f"there is no overhead model {model_id!r}")
        return model

    def evidence(self, model: Model) -> tuple[Evidence, ...]:
        """Return how the model stands against each data set of its hypervisors."""
        return self._evidence[model.id]

    def shortfall(self, model: Model) -> Evidence | None:
        """Return the worst evidence that guests are charged too little, or None."""
        short = [found for found in self.evidence(model) if found.under_rows_charged]
        return max(short, key=lambda found: found.max_under_mb_charged, default=None)

    def default_for(self, hypervisor_type: str) -> Model:
        """Return the model that prices guests on such a host. Case does not matter."""
        chosen = self.defaults.get(hypervisor_type.lower(), self.defaults[ANY_TYPE])
        return self.models[chosen]

    def with_defaults(self, chosen: Mapping[str, str]) -> "Catalogue":
        """Return a catalogue that prices the hypervisor types in `chosen` with those models.

        Raises:
            UnknownModelError: a model is not shipped.
            UnsafeModelError: a model charges less than was measured.
        """
        defaults = dict(self.defaults)
        for hypervisor_type, model_id in chosen.items():
            model = self.get(model_id)
            short = self.shortfall(model)
            if short is not None:
                raise UnsafeModelError(
                    f"{model.id} charges less than was measured for {short.under_rows_charged} of"
                    f" {short.rows} guests of {short.dataset}, by up to"
                    f" {float(short.max_under_mb_charged):g} MB: hosts would be oversubscribed"
                )
            defaults[hypervisor_type.lower()] = model.id
        return replace(self, defaults=defaults)


def build(
    models: Iterable[Model], datasets: Sequence[DataSet], defaults: Mapping[str, str]
) -> Catalogue:
    """Return a catalogue in which every default has been checked against the measurements.

    Raises:
        UnknownModelError: a default is not among the models, or there is none for other types.
        UnsafeModelError: a default charges less than was measured.
    """
    by_id = {model.id: model for model in models}
    evidence = {
        model.id: tuple(
            found
            for dataset in datasets
            if dataset.hypervisor_type in model.hypervisor_types
            and (found := evaluate(model, dataset)) is not None
        )
        for model in by_id.values()
    }
    if ANY_TYPE not in defaults:
        raise UnknownModelError(f"no model for hypervisors not named (key {ANY_TYPE!r})")
    empty = Catalogue(models=by_id, datasets=datasets, defaults={}, _evidence=evidence)
    return empty.with_defaults(defaults)


@functools.cache
def shipped() -> Catalogue:
    """Return the catalogue that comes with this package."""
    data = resources.files("hostler_capacity") / "data"
    document = json.loads((data / "models.json").read_text("utf-8"))
    datasets = [
        DataSet(
            id=DataSetId(entry["id"]),
            title=entry["title"],
            hypervisor_type=entry["hypervisor_type"],
            rows=tuple(_measurements((data / entry["file"]).read_text("utf-8"))),
        )
        for entry in document["datasets"]
    ]
    return build(map(_model, document["models"]), datasets, document["defaults"])


def _measurements(text: str) -> Iterable[Measurement]:
    for row in csv.DictReader(text.splitlines()):
        yield Measurement(
            memory_mb=Fraction(row["memory_mb"]),
            vcpus=int(row["vcpus"]) if "vcpus" in row else None,
            vm_type=None,
            overhead_mb=Fraction(row["overhead_mb"]),
        )


def _model(entry: Mapping[str, Any]) -> Model:
    categories = {
        name: tuple(_term(term) for term in terms) for name, terms in entry["categories"].items()
    }
    return Model(
        id=ModelId(entry["id"]),
        version=entry["version"],
        title=entry["title"],
        source=entry["source"],
        hypervisor_types=tuple(entry["hypervisor_types"]),
        categories=categories,
        default_category=entry.get("default_category", "any"),
        rounding=Rounding(entry["rounding"]),
        envelope_mb=Fraction(entry.get("envelope_mb", "0")),
    )


def _term(entry: Mapping[str, str]) -> Term:
    return Term(
        base_mb=Fraction(entry.get("base_mb", "0")),
        per_memory_mb=Fraction(entry.get("per_memory_mb", "0")),
        per_vcpu_mb=Fraction(entry.get("per_vcpu_mb", "0")),
        rounding=Rounding(entry.get("rounding", "none")),
        minimum_mb=Fraction(entry.get("minimum_mb", "0")),
    )

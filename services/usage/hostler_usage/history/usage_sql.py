"""The SQL of usage: facts clipped to a window, sums of whole days, and what a measure makes of them.

Names in it are constants of this module, or a mapping's, which were checked when it was read.

A window may be cut into slices at any moments, its `edges`: an array of them, in order, from the
window's begin to its end. Facts and days then say in `slice` which of the slices they are of,
counted from one. So one reading answers for all slices.

Who belonged to which group of projects, and when, is joined here and nowhere else: `memberships`
are spans of a project's time in which its groups do not change, and `facts` and `days` with
`groups` are cut where one ends and the next begins. What is of no such span, because its project
never was in a group of these kinds or is not known, is in no group.
"""

# ruff: noqa: S608  see above
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Final

from hostler_usage.reading.mapping import Measure

_DAY: Final = "interval '24 hours'"  # of UTC; a day of the session's time zone may have 23 or 25
_MOMENT: Final = "interval '1 microsecond'"


def memberships(kinds: Sequence[str], clause: str) -> str:
    """The common table `membership`: a project's spans of time, `group_of_0` and so on its groups then.

    `kinds` are the places of the kinds of groups; `clause` restricts projects. A project's spans
    leave no gap: before, between and after its memberships the groups are null.
    """
    edges = f"FROM project_group WHERE kind IN ({', '.join(kinds)}){clause}"
    names = "".join(f", of_{n}.name AS group_of_{n}" for n in range(len(kinds)))
    joins = "".join(
        f" LEFT JOIN project_group AS of_{n} ON of_{n}.kind = {kind}"
        f" AND of_{n}.project_id = member AND tstzrange(of_{n}.valid_from, of_{n}.valid_until) @> member_from"
        for n, kind in enumerate(kinds)
    )
    return (
        f"membership AS (SELECT member, member_from, member_until{names} FROM (SELECT member,"
        " edge AS member_from, lead(edge, 1, 'infinity') OVER (PARTITION BY member ORDER BY edge)"
        f" AS member_until FROM (SELECT project_id AS member, valid_from AS edge {edges} UNION"
        f" SELECT project_id, valid_until {edges} AND valid_until IS NOT NULL UNION"
        f" SELECT project_id, '-infinity' {edges}) AS edges) AS spans{joins})"
    )


Sums = Mapping[str | None, Decimal | None]
"""The values of `sums`."""

Stretch = tuple[str, str]
"""The places of the first day of some, and of the one behind the last."""


def split_days(stretches: Sequence[Stretch]) -> str:
    """The common table `split_day`, over `membership`: days within which a project changes its groups.

    Their sums are of no group: `days` leaves them out, and `facts` among them puts them in.
    """
    day = "date_trunc('day', member_from, 'UTC')"
    among = " OR ".join(
        f"(member_from > {_midnight(first)} AND member_from < {_midnight(last)})"
        for first, last in stretches
    )
    return (
        f"split_day AS (SELECT DISTINCT member AS split_member, {day} AS split_from,"
        f" {day} + {_DAY} AS split_until FROM membership WHERE ({among}) AND {day} <> member_from)"
    )


def held_split(lower: str, upper: str) -> str:
    """The join that makes of an interval between two places its part in each span of `membership`."""
    return (
        " LEFT JOIN membership ON member = project_id"
        f" AND member_from < {upper} AND member_until > {lower}"
    )


MOVED_SPLIT: Final = (
    " LEFT JOIN membership ON member = a.project_id AND member_from <= at AND member_until > at"
)
"""The join that finds for an amount, `a`, the span of `membership` that it moved in."""


def group_columns(groups: int) -> str:
    """The columns of `membership` that name groups, behind others."""
    return "".join(f", group_of_{n}" for n in range(groups))


def facts(
    clause: str,
    bucket: str | None,
    zone: str,
    *,
    start: str = "$1",
    end: str = "$2",
    groups: int = 0,
    is_split: bool = False,
    edges: str | None = None,
    has_states: bool = True,
    is_brief: bool = False,
) -> str:
    """What was held and what moved between two places, one row a piece; cut at buckets, if asked.

    With `edges`, the place of the window's, it is cut into slices instead.

    A bucket lasts from the moment its first local time spells to the next one's. Where clocks are
    set back, a local time is spelled twice and means the later moment, so that a moment may belong
    to the bucket before the one that its own local time names.

    With `groups`, how many kinds `memberships` has, rows are cut where a project changes its groups
    and end with them. With `is_split` the rows are those of each `split_day`. What a resource was
    when something moved is looked up only if this `has_states`. A span that `is_brief` is spelled out,
    not in places, and does not end before it begins.
    """
    among = in_reach = ""
    if is_brief:
        # the same once more, for the index that finds a span's intervals among those of years before and after it;
        # a plan for any span would think all of them brief, and read the whole index beside a project's own
        in_reach = f" AND tstzrange(starts_at, ends_at) && tstzrange({start}, {end})"
    if is_split:
        among = " JOIN split_day ON split_member = project_id"
        start, end = "split_from", "split_until"
    lower, upper = f"greatest(starts_at, {start})", f"least(ends_at, {end})"
    split = moved_split = ""
    if groups:
        split, moved_split = held_split(lower, upper), MOVED_SPLIT
        lower, upper = f"greatest({lower}, member_from)", f"least({upper}, member_until)"
    cut = name = moved_in = ""
    if bucket is not None:
        local = f"date_trunc('{bucket}', {{}} AT TIME ZONE {zone})"
        spelled = "to_char({}, 'YYYY-MM-DD\"T\"HH24:MI:SS')"
        step = f"interval '1 {bucket}'"
        cut = (
            f" CROSS JOIN LATERAL (SELECT local, greatest({lower}, local AT TIME ZONE {zone})"
            f" AS since, least({upper}, (local + {step}) AT TIME ZONE {zone}) AS until"
            f" FROM generate_series({local.format(lower)} - {step},"
            f" {upper} AT TIME ZONE {zone}, {step}) AS local) AS cut"
        )
        name = f", {spelled.format('local')} AS bucket"
        first = local.format("at")
        moved_in = ", " + spelled.format(
            f"CASE WHEN {first} AT TIME ZONE {zone} <= at THEN {first} ELSE {first} - {step} END"
        )
        lower, upper = "since", "until"
    elif edges is not None:
        # the slices that it touches are looked up, not compared with one by one: there may be hundreds
        touched = (
            f"{edges}[width_bucket({lower}, {edges}):width_bucket({upper} - {_MOMENT}, {edges})]"
        )
        cut = (
            f" CROSS JOIN LATERAL (SELECT width_bucket(edge, {edges}) AS slice,"
            f" greatest({lower}, edge) AS since,"
            f" least({upper}, {edges}[width_bucket(edge, {edges}) + 1]) AS until"
            f" FROM unnest({touched}) AS edge) AS cut"
        )
        name, moved_in = ", slice", f", width_bucket(at, {edges})"
        lower, upper = "since", "until"
    held = (
        "SELECT region, resource_type, resource_id, project_id, user_id, state_class, attributes,"
        f" NULL::text AS counter, ''::text AS label, 1000000 * (extract(epoch FROM {upper})"
        f" - extract(epoch FROM {lower})) AS quantity, NULL::text AS summed{name}{group_columns(groups)}"
        f" FROM usage_interval{among}{split}{cut}"
        f" WHERE {start} < {end} AND starts_at < {end}"
        f" AND (ends_at IS NULL OR ends_at > {start}){in_reach}{clause}"
        + (" AND since < until" if cut else "")
    )
    was, looked_up = "NULL::text, NULL::text, NULL::jsonb", ""
    if has_states:  # it is in the one interval of that moment
        was = "i.user_id, i.state_class, i.attributes"
        looked_up = (
            " LEFT JOIN usage_interval AS i ON (i.resource_id, i.resource_type, i.region)"
            " = (a.resource_id, a.resource_type, a.region)"
            " AND i.starts_at <= a.at AND (i.ends_at IS NULL OR i.ends_at > a.at)"
        )
    moved = (
        f"SELECT a.region, a.resource_type, a.resource_id, a.project_id, {was},"
        f" a.counter, a.label, a.amount, NULL::text{moved_in}{group_columns(groups)}"
        f" FROM (SELECT * FROM usage_amount{among} WHERE at >= {start} AND at < {end}{clause}) AS a"
        f"{looked_up}{moved_split}"
    )
    return f"{held} UNION ALL {moved}"


def days(
    clause: str,
    bucket: str | None,
    stretches: Sequence[Stretch],
    *,
    groups: int = 0,
    edges: str | None = None,
) -> str:
    """Sums of whole UTC days of some stretches, in rows of the same shape as `facts`.

    With `groups`, but for each `split_day` of a project. With `edges` no day may be cut by one.
    """
    name = split = whole = ""
    if groups:
        split = (
            " LEFT JOIN membership ON member = project_id"
            f" AND member_from <= {_midnight('day')} AND member_until > {_midnight('day')}"
        )
        whole = (
            " AND NOT EXISTS (SELECT FROM split_day WHERE split_member = project_id"
            f" AND split_from = {_midnight('day')})"
        )
    if bucket is not None:
        name = (
            f", to_char(date_trunc('{bucket}', day::timestamp), 'YYYY-MM-DD\"T\"HH24:MI:SS')"
            " AS bucket"
        )
    elif edges is not None:
        name = f", width_bucket({_midnight('day')}, {edges}) AS slice"
    among = " OR ".join(f"(day >= {first} AND day < {last})" for first, last in stretches)
    return (
        "SELECT region, resource_type, NULL::text AS resource_id,"
        " nullif(project_id, '') AS project_id, NULL::text AS user_id, NULL::text AS state_class,"
        " NULL::jsonb AS attributes, NULL::text AS counter, ''::text AS label, amount AS quantity,"
        f" measure AS summed{name}{group_columns(groups)} FROM usage_day{split}"
        f" WHERE $1::timestamptz < $2::timestamptz AND ({among}) AND amount <> 0{clause}{whole}"
    )


def _midnight(day: str) -> str:
    """When a UTC day begins."""
    return f"{day}::date::timestamp AT TIME ZONE 'UTC'"


KINDS: Final = ("resource_type", "counter", "summed")
"""What facts and days must be told apart by for `sums` to be of one kind."""


def sums(measures: Sequence[Measure]) -> dict[str | None, str]:
    """By attribute what facts or days of one kind sum up to; without one, the quantity alone.

    Of these `amounts` makes what each measure amounts to. There are few attributes and many measures:
    that is less to sum than a `total` for each.
    """
    found: dict[str | None, str] = {None: "sum(quantity)"}
    for name in sorted({item.attribute for item in measures if item.attribute is not None}):
        types = sorted({f"'{item.resource_type}'" for item in measures if item.attribute == name})
        found[name] = (
            f"sum(quantity * coalesce((attributes->>'{name}')::bigint, 0)) FILTER (WHERE"
            f" resource_type IN ({', '.join(types)}) AND counter IS NULL AND summed IS NULL)"
        )
    return found


def amounts(
    measures: Sequence[Measure], counter: str | None, summed: str | None, sums: Sums
) -> dict[str, int]:
    """What measures of one type amount to over facts or days of one kind; what is nothing is left out."""
    if summed is not None:
        found = {item.name: sums[None] for item in measures if item.name == summed}
    elif counter is not None:
        found = {item.name: sums[None] for item in measures if item.counter == counter}
    else:
        found = {item.name: sums[item.attribute] for item in measures if item.is_held}
    return {name: int(amount) for name, amount in found.items() if amount}


def named(measures: Sequence[Measure]) -> tuple[list[str], str]:
    """The columns that sum up facts of one `resource_type` and `counter`, and the rows that name measures in them.

    Each of the rows, `named`, has the `name` of a measure and what it amounts to in `amount`; they are
    joined to `kinds`, which has the columns.
    """
    by_attribute = sums(measures)
    column = {attribute: f"sum_{n}" for n, attribute in enumerate(by_attribute)}
    counter = {None: "NULL"} | {
        name: f"'{name}'" for name in (item.counter for item in measures) if name
    }
    rows = ", ".join(
        f"('{item.resource_type}', {counter[item.counter]}, '{item.name}', {column[item.attribute]})"
        for item in measures
    )
    return (
        [f"{text} AS {column[attribute]}" for attribute, text in by_attribute.items()],
        f" LEFT JOIN LATERAL (VALUES {rows}) AS named (of_type, of_counter, name, amount)"
        " ON of_type = kinds.resource_type AND of_counter IS NOT DISTINCT FROM kinds.counter"
        " AND amount <> 0",
    )


def total(measure: Measure) -> str:
    """What a measure amounts to over facts; names were checked with the mapping."""
    of = f"resource_type = '{measure.resource_type}'"
    if measure.counter is not None:
        return (
            f"sum(quantity) FILTER (WHERE {of} AND (counter = '{measure.counter}'"
            f" OR summed = '{measure.name}'))"
        )
    product = "quantity"
    if measure.attribute is not None:
        product = f"quantity * coalesce((attributes->>'{measure.attribute}')::bigint, 0)"
    return (
        f"sum(CASE WHEN summed IS NULL THEN {product} ELSE quantity END) FILTER (WHERE {of}"
        f" AND counter IS NULL AND (summed IS NULL OR summed = '{measure.name}'))"
    )

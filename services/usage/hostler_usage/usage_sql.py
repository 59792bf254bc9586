"""The SQL of usage: facts clipped to a window, sums of whole days, and what a measure makes of them.

Names in it are constants of this module, or a mapping's, which were checked when it was read.
"""

# ruff: noqa: S608  see above
from hostler_usage.mapping import Measure


def facts(
    clause: str, bucket: str | None, zone: str, *, start: str = "$1", end: str = "$2"
) -> str:
    """What was held and what moved between two places, one row a piece; cut at buckets, if asked.

    A bucket lasts from the moment its first local time spells to the next one's. Where clocks are
    set back, a local time is spelled twice and means the later moment, so that a moment may belong
    to the bucket before the one that its own local time names.
    """
    lower, upper = f"greatest(starts_at, {start})", f"least(ends_at, {end})"
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
    held = (
        "SELECT region, resource_type, resource_id, project_id, user_id, state_class, attributes,"
        f" NULL::text AS counter, ''::text AS label, 1000000 * (extract(epoch FROM {upper})"
        f" - extract(epoch FROM {lower})) AS quantity, NULL::text AS summed{name} FROM usage_interval{cut}"
        f" WHERE {start} < {end} AND starts_at < {end}"
        f" AND (ends_at IS NULL OR ends_at > {start}){clause}"
        + (" AND since < until" if bucket else "")
    )
    # what a resource was when something moved is in the interval of that moment
    moved = (
        "SELECT a.region, a.resource_type, a.resource_id, a.project_id, i.user_id, i.state_class,"
        f" i.attributes, a.counter, a.label, a.amount, NULL::text{moved_in} FROM (SELECT * FROM usage_amount"
        f" WHERE at >= {start} AND at < {end}{clause}) AS a LEFT JOIN usage_interval AS i"
        " ON (i.resource_id, i.resource_type, i.region) = (a.resource_id, a.resource_type, a.region)"
        " AND i.starts_at <= a.at AND (i.ends_at IS NULL OR i.ends_at > a.at)"
    )
    return f"{held} UNION ALL {moved}"


def days(clause: str, bucket: str | None, *, first: str, last: str) -> str:
    """Sums of whole UTC days from one place up to another, in rows of the same shape as `facts`."""
    name = ""
    if bucket is not None:
        name = f", to_char(date_trunc('{bucket}', day::timestamp), 'YYYY-MM-DD\"T\"HH24:MI:SS')"
    return (
        "SELECT region, resource_type, NULL, nullif(project_id, ''), NULL, NULL, NULL::jsonb, NULL,"
        f" '', amount, measure{name} FROM usage_day WHERE day >= {first} AND day < {last}"
        f" AND amount <> 0{clause}"
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

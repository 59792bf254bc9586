-- Audit reconciliation: what became of each audit period of each resource (docs/usage-audits.md has the codes).

CREATE TABLE audit_verdict (
    region         text        NOT NULL,
    resource_type  text        NOT NULL,
    resource_id    text        NOT NULL,  -- '' of a period in which a whole host, or type, was not audited
    period_start   timestamptz NOT NULL,
    -- 'statement': of what was said, written by the fold; 'silence': of what was not, by the check
    origin         text        NOT NULL,
    ordinal        integer     NOT NULL,
    period_end     timestamptz NOT NULL,
    periods        integer     NOT NULL,
    is_partial     boolean     NOT NULL,
    status         text        NOT NULL,
    code           text        NOT NULL,
    field          text,
    ours           jsonb       NOT NULL,
    theirs         jsonb       NOT NULL,
    project_id     text,
    host           text        NOT NULL,  -- '' where there is none
    statements     integer     NOT NULL,
    evidence       jsonb       NOT NULL,
    PRIMARY KEY (resource_id, resource_type, region, period_start, origin, ordinal),
    CHECK (period_end >= period_start AND periods > 0)
);
CREATE INDEX audit_verdict_newest ON audit_verdict (period_start, region, resource_type, resource_id, origin, ordinal);
CREATE INDEX audit_verdict_project ON audit_verdict (project_id, period_start);
CREATE INDEX audit_verdict_trouble ON audit_verdict (status, period_start) WHERE status <> 'verified';

-- what the check needs of a resource's life, so that it reads no intervals
CREATE TABLE audit_resource (
    region         text        NOT NULL,
    resource_type  text        NOT NULL,
    resource_id    text        NOT NULL,
    born_at        timestamptz,
    ended_at       timestamptz,
    lived          jsonb       NOT NULL,
    launches       jsonb       NOT NULL,
    confirmed_at   timestamptz,
    PRIMARY KEY (resource_id, resource_type, region)
);
CREATE INDEX audit_resource_ended_at ON audit_resource (region, resource_type, ended_at);

-- periods that are known to have been audited, or (is_expected) that those before lead to expect
CREATE TABLE audit_period (
    region         text        NOT NULL,
    resource_type  text        NOT NULL,
    period_start   timestamptz NOT NULL,
    period_end     timestamptz NOT NULL,
    is_expected    boolean     NOT NULL,
    first_seen     timestamptz NOT NULL,
    checked_at     timestamptz,           -- null: to be checked, for the first time or again
    statements     bigint,                -- resources whose statements cover it, at the check
    PRIMARY KEY (region, resource_type, period_start, period_end)
);
CREATE INDEX audit_period_unchecked ON audit_period (period_end) WHERE checked_at IS NULL;

CREATE INDEX audit_period_checked ON audit_period (region, resource_type, period_end) WHERE checked_at IS NOT NULL;

CREATE TABLE audit_period_host (
    region         text        NOT NULL,
    resource_type  text        NOT NULL,
    host           text        NOT NULL,  -- '' of types whose audits do not run per host
    period_start   timestamptz NOT NULL,
    period_end     timestamptz NOT NULL,
    PRIMARY KEY (region, resource_type, host, period_start, period_end)
);

-- resources whose silence is to be looked at anew, from some moment on
CREATE TABLE audit_recheck (
    region         text        NOT NULL,
    resource_type  text        NOT NULL,
    resource_id    text        NOT NULL,
    since          timestamptz NOT NULL,
    PRIMARY KEY (resource_id, resource_type, region)
);

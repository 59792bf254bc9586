-- What usage costs and how much of it may be had. Nothing here is made from usage: costs are computed when asked for.

-- a book is never edited: every change is a new version, so that a cost can be computed again as it was shown
CREATE TABLE price_book (
    name        text        NOT NULL,
    version     integer     NOT NULL,
    document    jsonb       NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    created_by  text        NOT NULL,
    PRIMARY KEY (name, version)
);

-- which group of a kind (domain, cost_center, ...) a project belongs to, and when; valid_until is null while it does.
-- A project is in one group of a kind at a time: costs of the groups of a kind add up to the whole.
-- (btree_gist is trusted: the owner of the database may create it. It gives gist the = of text.)
CREATE EXTENSION IF NOT EXISTS btree_gist;
CREATE TABLE project_group (
    kind         text        NOT NULL,
    name         text        NOT NULL,
    project_id   text        NOT NULL,
    valid_from   timestamptz NOT NULL,
    valid_until  timestamptz,
    PRIMARY KEY (kind, project_id, valid_from),
    CHECK (valid_until > valid_from),
    EXCLUDE USING gist (kind WITH =, project_id WITH =, tstzrange(valid_from, valid_until) WITH &&)
);
CREATE INDEX project_group_name ON project_group (kind, name);

-- projects, or user_id, or group_kind and group_name: whose use is counted
CREATE TABLE budget (
    name        text        PRIMARY KEY,
    version     integer     NOT NULL,
    document    jsonb       NOT NULL,
    projects    text[],
    user_id     text,
    group_kind  text,
    group_name  text,
    updated_at  timestamptz NOT NULL DEFAULT now(),
    updated_by  text        NOT NULL
);

-- a threshold that was reached, once for each budget, period and threshold: written with the event that tells of it
CREATE TABLE budget_crossing (
    budget        text        NOT NULL REFERENCES budget (name) ON DELETE CASCADE,
    period_start  timestamptz NOT NULL,
    threshold     integer     NOT NULL,
    period_end    timestamptz NOT NULL,
    crossed_at    timestamptz NOT NULL,
    consumed      text        NOT NULL, -- a decimal, or a fraction where it has no end
    limit_amount  text        NOT NULL,
    PRIMARY KEY (budget, period_start, threshold)
);

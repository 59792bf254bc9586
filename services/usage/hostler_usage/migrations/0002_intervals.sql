-- What follows from the events: which resources are to be reckoned anew (touched), and what came of it. All of it but
-- `touched` can be made again from raw_event and statement_apart.

-- one row a stored batch: the resources it speaks of, in three arrays of one length. Only ever appended and deleted,
-- so that ingest waits for nobody.
CREATE TABLE touched (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    marked_at       timestamptz NOT NULL DEFAULT now(),
    regions         text[]      NOT NULL,
    resource_types  text[]      NOT NULL,
    resource_ids    text[]      NOT NULL
);

CREATE TABLE resource (
    region         text        NOT NULL,
    resource_type  text        NOT NULL,
    resource_id    text        NOT NULL,
    anomalies      text[]      NOT NULL DEFAULT '{}',
    folded_at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (resource_id, resource_type, region)
);

-- what was held
CREATE TABLE usage_interval (
    region         text        NOT NULL,
    resource_type  text        NOT NULL,
    resource_id    text        NOT NULL,
    starts_at      timestamptz NOT NULL,
    ends_at        timestamptz,
    project_id     text,
    user_id        text,
    state_class    text        NOT NULL,
    attributes     jsonb       NOT NULL,
    opened_by      jsonb       NOT NULL,
    closed_by      jsonb       NOT NULL,
    provenance     text        NOT NULL,
    PRIMARY KEY (resource_id, resource_type, region, starts_at),
    CHECK (ends_at > starts_at)
);
CREATE INDEX usage_interval_project ON usage_interval (project_id, ends_at);
CREATE INDEX usage_interval_ends_at ON usage_interval (ends_at);

-- what moved: bytes, operations; each amount belongs to one moment
CREATE TABLE usage_amount (
    region         text        NOT NULL,
    resource_type  text        NOT NULL,
    resource_id    text        NOT NULL,
    counter        text        NOT NULL,
    label          text        NOT NULL,
    at             timestamptz NOT NULL,
    amount         numeric     NOT NULL,
    project_id     text,
    evidence       jsonb       NOT NULL,
    PRIMARY KEY (resource_id, resource_type, region, counter, label, at)
);
CREATE INDEX usage_amount_project ON usage_amount (project_id, at);
CREATE INDEX usage_amount_at ON usage_amount (at);

-- Operations: starts, ends and errors of one action on one resource, paired.

CREATE TABLE operation (
    region         text        NOT NULL,
    resource_type  text        NOT NULL,
    resource_id    text        NOT NULL,
    begun_at       timestamptz NOT NULL,  -- when it started, else when it ended
    ordinal        integer     NOT NULL,
    action         text        NOT NULL,
    request_id     text,
    started_at     timestamptz,
    ended_at       timestamptz,
    outcome        text        NOT NULL,
    duration_us    bigint,
    host           text,
    flavor         text,
    project_id     text,
    reason         text,
    evidence       jsonb       NOT NULL,
    PRIMARY KEY (resource_id, resource_type, region, begun_at, ordinal)
);
CREATE INDEX operation_newest ON operation (begun_at, region, resource_type, resource_id, ordinal);
CREATE INDEX operation_project ON operation (project_id, begun_at);
CREATE INDEX operation_unfinished ON operation (started_at) WHERE outcome = 'unfinished';

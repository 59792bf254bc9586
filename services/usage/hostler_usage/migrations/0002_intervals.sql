-- From events to usage: what each message says of a resource (observation), which resources are to be folded anew
-- (dirty), and what the fold made of them (usage_interval). The last two follow from the first.

CREATE TABLE observation (
    region         text        NOT NULL,
    resource_type  text        NOT NULL,
    resource_id    text        NOT NULL,
    event_time     timestamptz NOT NULL,
    message_id     text        NOT NULL,
    body_sha256    bytea       NOT NULL,
    ordinal        smallint    NOT NULL,
    kind           text        NOT NULL,
    t_eff          timestamptz NOT NULL,
    rank           smallint    NOT NULL,
    opens          boolean     NOT NULL,
    is_rounded     boolean     NOT NULL,
    attributes     jsonb       NOT NULL,
    norm_version   smallint    NOT NULL,
    PRIMARY KEY (region, resource_type, resource_id, event_time, message_id, body_sha256, ordinal)
);

CREATE TABLE dirty (
    region         text        NOT NULL,
    resource_type  text        NOT NULL,
    resource_id    text        NOT NULL,
    marked_at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (region, resource_type, resource_id)
);

CREATE TABLE usage_interval (
    region         text        NOT NULL,
    resource_type  text        NOT NULL,
    resource_id    text        NOT NULL,
    starts_at      timestamptz NOT NULL,
    ends_at        timestamptz,
    project_id     text,
    user_id        text,
    state          text,
    state_class    text        NOT NULL,
    flavor         text,
    image          text,
    host           text,
    zone           text,
    volume_type    text,
    vcpus          bigint,
    memory_mb      bigint,
    disk_gb        bigint,
    size_gb        bigint,
    attributes     jsonb       NOT NULL,
    opened_by      jsonb       NOT NULL,
    closed_by      jsonb       NOT NULL,
    provenance     text        NOT NULL,
    PRIMARY KEY (region, resource_type, resource_id, starts_at),
    CHECK (ends_at > starts_at)
);
CREATE INDEX usage_interval_project ON usage_interval (project_id, ends_at);
CREATE INDEX usage_interval_ends_at ON usage_interval (ends_at);

CREATE TABLE resource (
    region         text        NOT NULL,
    resource_type  text        NOT NULL,
    resource_id    text        NOT NULL,
    anomalies      text[]      NOT NULL,
    folded_at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (region, resource_type, resource_id)
);

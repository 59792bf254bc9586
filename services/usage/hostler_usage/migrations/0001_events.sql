-- Every notification ever read, byte for byte, once. The key is made of the message alone: all copies of a message
-- carry the same event time, so they meet in one partition and the key keeps the first. (Partitions by time of receipt
-- could not: a copy that comes after midnight would be another row.) Two bodies under one message id are two rows.

-- how messages come, which is the same for thousands of them: every message names a row of it
CREATE TABLE origin (
    id                integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    source            text NOT NULL,
    exchange          text NOT NULL,
    routing_key       text NOT NULL,
    content_type      text NOT NULL,  -- empty where the message had none
    content_encoding  text NOT NULL,
    UNIQUE (source, exchange, routing_key, content_type, content_encoding)
);

CREATE SEQUENCE raw_event_seq;

CREATE TABLE raw_event (
    event_time     timestamptz NOT NULL,
    message_id     text        NOT NULL,
    body_sha256    bytea       NOT NULL,
    seq            bigint      NOT NULL DEFAULT nextval('raw_event_seq'),  -- grows as they come, with gaps
    received_at    timestamptz NOT NULL DEFAULT now(),
    origin         integer     NOT NULL,
    region         text        NOT NULL,
    event_type     text        NOT NULL,
    publisher_id   text        NOT NULL,
    priority       text        NOT NULL,
    request_id     text,
    project_id     text,
    resource_type  text,
    resource_id    text,
    has_own_id     boolean     NOT NULL,
    is_known       boolean     NOT NULL,
    problems       text[],
    headers        jsonb,
    said           text,  -- what it says of its resource (statement.encode); null where nothing follows from it
    body           bytea       COMPRESSION lz4 NOT NULL,
    PRIMARY KEY (event_time, message_id, body_sha256)
) PARTITION BY RANGE (event_time);

CREATE INDEX raw_event_message_id ON raw_event (message_id);
CREATE INDEX raw_event_resource ON raw_event (resource_id, event_time) WHERE resource_id IS NOT NULL;
CREATE INDEX raw_event_project ON raw_event (project_id, event_time) WHERE project_id IS NOT NULL;
CREATE INDEX raw_event_seq_range ON raw_event USING brin (seq) WITH (pages_per_range = 16, autosummarize = on);

-- months are made ahead by the service (store.make_partitions); whatever falls outside them is here
CREATE TABLE raw_event_default PARTITION OF raw_event DEFAULT;

-- what a message says of the second and further resources it speaks of, and what the messages of dropped partitions
-- said: everything a history is made of that is not in raw_event.said
CREATE TABLE statement_apart (
    region         text        NOT NULL,
    resource_type  text        NOT NULL,
    resource_id    text        NOT NULL,
    event_time     timestamptz NOT NULL,
    message_id     text        NOT NULL,
    body_sha256    bytea       NOT NULL,
    said           text        NOT NULL,
    PRIMARY KEY (resource_id, resource_type, region, event_time, message_id, body_sha256)
);

-- one message id, two bodies: both are stored, both are folded, and here it is said
CREATE TABLE event_conflict (
    event_time   timestamptz NOT NULL,
    message_id   text        NOT NULL,
    bodies       integer     NOT NULL,
    noticed_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (event_time, message_id)
);

-- what became of the notifications read, counted in the transaction that stored them: exact over crashes and
-- redelivery. A row belongs to one process, so that replicas do not wait for each other.
CREATE TABLE ingest_tally (
    source       text        NOT NULL,
    hour         timestamptz NOT NULL,
    writer       uuid        NOT NULL,
    stored       bigint      NOT NULL,
    duplicate    bigint      NOT NULL,
    conflict     bigint      NOT NULL,
    unknown_type bigint      NOT NULL,
    problem      bigint      NOT NULL,
    last_at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (source, hour, writer)
);

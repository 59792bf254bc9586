-- What hostler_common keeps in every service's schema.

CREATE TABLE outbox (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    exchange      text        NOT NULL,
    routing_key   text        NOT NULL,
    properties    jsonb       NOT NULL,
    body          bytea       NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE quarantine (
    id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    queue          text        NOT NULL,
    exchange       text        NOT NULL,
    routing_key    text        NOT NULL,
    properties     jsonb       NOT NULL,
    body           bytea       NOT NULL,
    body_sha256    bytea       NOT NULL,
    code           text        NOT NULL,
    reason         text        NOT NULL,
    attempts       integer     NOT NULL,
    seen           bigint      NOT NULL DEFAULT 1,
    quarantined_at timestamptz NOT NULL DEFAULT now(),
    -- the same bad message delivered again is the same row, seen once more
    UNIQUE (queue, body_sha256, routing_key, exchange)
);

CREATE TABLE idempotency_key (
    key          text        PRIMARY KEY,
    fingerprint  bytea       NOT NULL,
    status       integer,
    reply        jsonb,
    created_at   timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX idempotency_key_created_at ON idempotency_key (created_at);

-- Feeds: which events each page of a feed holds, and who is told of new ones.

-- up to where the feeds are cut into pages, and what is waited for before they are cut further. seq is given out before
-- its transaction commits: an event below the highest seq may still appear. awaited_seq is a highest seq that was seen,
-- awaited_xid a transaction id that was given out a turn later: once no transaction with a lower id runs, nothing at or
-- below awaited_seq can appear any more.
CREATE TABLE feed_clock (
    id           boolean     PRIMARY KEY DEFAULT true CHECK (id),
    feeds_id     uuid        NOT NULL DEFAULT gen_random_uuid(),  -- the ids of the feeds are made of it
    began_at     timestamptz NOT NULL DEFAULT now(),
    settled_seq  bigint      NOT NULL DEFAULT 0,
    awaited_seq  bigint,
    awaited_xid  xid8,
    awaited_at   timestamptz
);
INSERT INTO feed_clock DEFAULT VALUES;

-- a page holds the times of its events, by which the key of raw_event finds them; only the last page of a feed changes.
-- What is dropped from raw_event is missing from its pages, and the page stays.
CREATE TABLE feed_page (
    kind       text          NOT NULL,  -- all, type, project
    key        text          NOT NULL,
    first_seq  bigint        NOT NULL,
    last_seq   bigint        NOT NULL,
    is_full    boolean       NOT NULL,
    times      timestamptz[] NOT NULL,
    types      text[]        NOT NULL,  -- the event types on a project's page
    PRIMARY KEY (kind, key, first_seq)
);

-- what subscribers asked for and the hub has not done yet: to verify that they did, or to tell them that they are denied
CREATE TABLE hub_request (
    id             bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    mode           text        NOT NULL CHECK (mode IN ('subscribe', 'unsubscribe', 'denied')),
    topic          text        NOT NULL,
    callback       text        NOT NULL,
    lease_seconds  integer     NOT NULL,
    secret         text,
    reason         text        NOT NULL DEFAULT '',
    caller         text        NOT NULL,
    projects       text[],  -- what the caller may see; null is everything
    attempts       integer     NOT NULL DEFAULT 0,
    asked_at       timestamptz NOT NULL DEFAULT now(),
    next_at        timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX hub_request_next ON hub_request (next_at);
CREATE INDEX hub_request_callback ON hub_request (callback, topic, id);

CREATE TABLE hub_subscription (
    id             bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    topic          text        NOT NULL,
    callback       text        NOT NULL,
    secret         text,
    caller         text        NOT NULL,
    projects       text[],
    verified_at    timestamptz NOT NULL DEFAULT now(),
    expires_at     timestamptz NOT NULL,
    after_seq      bigint      NOT NULL,  -- delivered up to here
    failures       integer     NOT NULL DEFAULT 0,  -- in a row
    next_at        timestamptz NOT NULL DEFAULT now(),
    deliveries     bigint      NOT NULL DEFAULT 0,
    delivered_at   timestamptz,
    last_answer    text,
    UNIQUE (callback, topic)
);
CREATE INDEX hub_subscription_next ON hub_subscription (next_at);
CREATE INDEX hub_subscription_caller ON hub_subscription (caller);

-- Making everything derived anew, and dropping old months.

-- what the messages of a span of time said of further resources, and what those of dropped months said: found by the
-- time of the message, which rows come in roughly the order of
CREATE INDEX statement_apart_event_time ON statement_apart USING brin (event_time) WITH (autosummarize = on);

-- the mappings that messages were normalised with since everything was made anew, one of them where all is well
CREATE TABLE mapping_in_use (
    digest  text        PRIMARY KEY,
    since   timestamptz NOT NULL DEFAULT now()
);

-- how far a rebuild has come: one that was broken off goes on here
CREATE TABLE rebuild (
    id             boolean     PRIMARY KEY DEFAULT true CHECK (id),
    program        text        NOT NULL,  -- version and mapping: another one's half is of no use
    began_at       timestamptz NOT NULL DEFAULT now(),
    phase          text        NOT NULL CHECK (phase IN ('messages', 'resources', 'days', 'done')),
    hashes_before  jsonb       NOT NULL,
    -- the last message read, of phase 'messages'
    event_time     timestamptz,
    message_id     text,
    body_sha256    bytea,
    -- the last resource marked to be reckoned, of phase 'resources'
    resource_id    text,
    resource_type  text,
    region         text,
    -- the last day summed up, of phase 'days'
    day            date,
    messages       bigint      NOT NULL DEFAULT 0,  -- read
    changed        bigint      NOT NULL DEFAULT 0,  -- of those, that say something else than before
    unreadable     bigint      NOT NULL DEFAULT 0,  -- of those, that no longer hold a notification: they say what they said
    resources      bigint      NOT NULL DEFAULT 0
);

-- What the example service keeps: which messages it handled, and how often each was handed over.

CREATE TABLE handled (
    message_id text PRIMARY KEY,
    body       bytea NOT NULL
);

CREATE TABLE handover (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    message_id text NOT NULL
);

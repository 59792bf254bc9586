-- One message id, several messages: all are stored, all are folded, and here it is said of each of them, whatever
-- their times. seq is that of raw_event: of messages under one id, the one with the lowest came first, and stays the
-- first when retention drops it. Rows of an id are gone
-- with the last of its messages. (Messages stored before this migration have theirs if they are of one time.)
ALTER TABLE event_conflict RENAME TO event_conflict_of_one_time;
ALTER INDEX event_conflict_pkey RENAME TO event_conflict_of_one_time_pkey;

CREATE TABLE event_conflict (
    message_id   text        NOT NULL,
    event_time   timestamptz NOT NULL,
    body_sha256  bytea       NOT NULL,
    seq          bigint      NOT NULL,
    noticed_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (message_id, event_time, body_sha256)
);
CREATE INDEX event_conflict_seq ON event_conflict (message_id, seq);
CREATE INDEX event_conflict_time ON event_conflict (event_time, message_id, body_sha256);

INSERT INTO event_conflict (message_id, event_time, body_sha256, seq, noticed_at)
SELECT message_id, event_time, e.body_sha256, e.seq, c.noticed_at
FROM event_conflict_of_one_time AS c JOIN raw_event AS e USING (event_time, message_id);

DROP TABLE event_conflict_of_one_time;

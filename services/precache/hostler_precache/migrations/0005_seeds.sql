-- Replicas that keep images, and when each was last there: of one that is gone for good, what it had
-- and somebody waits for is fetched again by another. Those that there are get their time from now on.
CREATE TABLE seed (
    seed text PRIMARY KEY,
    seen_at timestamptz NOT NULL DEFAULT now()
);
INSERT INTO seed (seed) SELECT DISTINCT seed FROM blob;

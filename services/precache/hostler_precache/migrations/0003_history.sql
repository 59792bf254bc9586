-- One row for an image of a policy, whatever happened to it: what failed is tried again in its row.
ALTER TABLE distribution
    ADD COLUMN failures integer NOT NULL DEFAULT 0 CHECK (failures >= 0),
    ADD COLUMN last_failure text,
    -- of one that was done for long: that it is over is younger than that
    ADD COLUMN cancelled_at timestamptz;
-- older rows of the same become nobody's, and go with what else is over
UPDATE distribution SET policy_id = NULL WHERE distribution_id IN (
    SELECT distribution_id FROM (
        SELECT distribution_id, row_number() OVER (PARTITION BY policy_id, image_id
            ORDER BY state IN ('fetching', 'distributing', 'done') DESC, created_at DESC) AS n
        FROM distribution WHERE policy_id IS NOT NULL) numbered
    WHERE n > 1);
CREATE UNIQUE INDEX distribution_policy_image ON distribution (policy_id, image_id)
    WHERE policy_id IS NOT NULL;
CREATE INDEX distribution_over ON distribution (greatest(finished_at, cancelled_at))
    WHERE finished_at IS NOT NULL;

-- Of two reports of one run of an agent, which is the later one, whichever comes first.
ALTER TABLE host ADD COLUMN sequence bigint;

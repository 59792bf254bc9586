-- Who is in a swarm is known from the distributions' hosts; what an agent says of itself is the host's.
DROP TABLE member;

ALTER TABLE host
    ADD COLUMN labels jsonb NOT NULL DEFAULT '{}',
    ADD COLUMN link_bytes_per_second bigint;
-- a report of a host changes its row every few seconds: leave room for the new version on the page
ALTER TABLE host SET (fillfactor = 60);

-- How an image gets onto its hosts. hosts NULL means: those with these labels, there are or will be.
ALTER TABLE distribution
    ADD COLUMN labels jsonb NOT NULL DEFAULT '{}',
    ADD COLUMN percent integer CHECK (percent BETWEEN 1 AND 100),
    ADD COLUMN canary_percent integer CHECK (canary_percent BETWEEN 1 AND 99),
    ADD COLUMN wave integer NOT NULL DEFAULT 1,
    ADD COLUMN deadline_at timestamptz,
    ADD COLUMN deadline_percent integer NOT NULL DEFAULT 100 CHECK (deadline_percent BETWEEN 1 AND 100),
    ADD COLUMN deadline_met boolean,
    ADD COLUMN host_bytes_per_second bigint CHECK (host_bytes_per_second > 0),
    ADD COLUMN total_bytes_per_second bigint CHECK (total_bytes_per_second > 0),
    ADD COLUMN windows jsonb NOT NULL DEFAULT '[]',
    ADD COLUMN is_open boolean NOT NULL DEFAULT true,
    ADD COLUMN paused_at timestamptz,
    ADD COLUMN paused_reason text;
-- who may still move, and whose deadline is to come: the periodic work reads these only
CREATE INDEX distribution_live ON distribution (created_at) WHERE state IN ('fetching', 'distributing');

ALTER TABLE distribution_host
    ADD COLUMN wave integer NOT NULL DEFAULT 1,
    ADD COLUMN coverage text NOT NULL DEFAULT '',
    ADD COLUMN started_at timestamptz;
ALTER TABLE distribution_host SET (fillfactor = 60);
CREATE INDEX distribution_host_open ON distribution_host (distribution_id, wave)
    WHERE state IN ('waiting', 'transferring');

ALTER TABLE transfer ADD COLUMN received_from_rack_bytes bigint NOT NULL DEFAULT 0;
ALTER TABLE transfer SET (fillfactor = 60);

ALTER TABLE policy ADD COLUMN labels jsonb NOT NULL DEFAULT '{}';

-- Deleted at its source: hosts are told, and no seed keeps it.
ALTER TABLE image ADD COLUMN deleted_at timestamptz;

-- Of the bytes that are distributed, which is not the source's where they were converted.
ALTER TABLE blob ADD COLUMN disk_format text;

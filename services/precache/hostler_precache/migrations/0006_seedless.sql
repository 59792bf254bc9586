-- What a seed has lost, or had when it went for good, may still be on hosts: they serve it then, and no seed
-- is named.
ALTER TABLE blob ALTER COLUMN seed_url DROP NOT NULL;

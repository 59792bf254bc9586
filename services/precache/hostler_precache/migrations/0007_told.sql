-- What was last told of a distribution on the bus, in the words of Nova's aggregate.cache_images: that it has
-- started, or ended. So each is told once, however it came about, and by whichever replica.
ALTER TABLE distribution ADD COLUMN told text CHECK (told IN ('start', 'end'));
UPDATE distribution SET told = CASE WHEN state = 'distributing' THEN 'start' ELSE 'end' END
    WHERE state <> 'fetching';
CREATE INDEX distribution_untold ON distribution (finished_at)
    WHERE state IN ('done', 'error', 'cancelled') AND told IS DISTINCT FROM 'end';

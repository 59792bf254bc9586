-- Intervals are found among those of years before and after them: by the time they have part in, for what sums of
-- whole days do not answer (a day that a window ends within), and by whose they were, for budgets of users.
CREATE INDEX usage_interval_span ON usage_interval USING gist (tstzrange(starts_at, ends_at));
CREATE INDEX usage_interval_user ON usage_interval (user_id, ends_at);

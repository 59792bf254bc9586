-- When the token ends by itself that a subscription was asked for with: no lease outlasts it, however late
-- the subscriber could be asked. Null: it does not end, or the request is older than this column.
ALTER TABLE hub_request ADD COLUMN token_ends_at timestamptz;

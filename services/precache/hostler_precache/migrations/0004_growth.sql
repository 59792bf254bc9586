-- Pieces go out while the source still sends: such a blob has a piece size, and no root yet.
ALTER TABLE blob
    ADD COLUMN piece_bytes integer CHECK (piece_bytes > 0),
    ADD COLUMN is_served boolean NOT NULL
        GENERATED ALWAYS AS (state = 'ready' OR (state = 'fetching' AND piece_bytes IS NOT NULL)) STORED,
    ADD CHECK (piece_bytes IS NULL OR size_bytes IS NOT NULL);

-- The digests of its pieces, in runs, as hosts have been told them. They never change; when the blob
-- is complete, or given up, they are gone from here.
CREATE TABLE blob_growth (
    blob_id uuid NOT NULL REFERENCES blob ON DELETE CASCADE,
    first_piece integer NOT NULL CHECK (first_piece >= 0),
    digests bytea NOT NULL,
    PRIMARY KEY (blob_id, first_piece)
);

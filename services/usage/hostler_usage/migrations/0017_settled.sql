-- What need not be read again. All of it can be lost: then everything is read, and settled again.

-- when the oldest message was sent that a batch says of each of its resources; null where that is not known
ALTER TABLE touched ADD COLUMN oldest timestamptz[];

-- of a resource: rows of amounts and verdicts that begin before rows_from are as they are, and of what was said before
-- said_from only `kept` matters to the others (settled.py)
CREATE TABLE settled (
    region         text        NOT NULL,
    resource_type  text        NOT NULL,
    resource_id    text        NOT NULL,
    rows_from      timestamptz NOT NULL,
    said_from      timestamptz NOT NULL,
    kept           text        NOT NULL,
    PRIMARY KEY (resource_id, resource_type, region)
);

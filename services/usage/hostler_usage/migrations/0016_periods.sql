-- Closed periods: what a month amounted to when it was closed, and every change since as a row of its own. The amounts
-- of a closed period are its lines, its adjustments, and what is noted and not written as adjustments yet.

CREATE TABLE period (
    name         text        PRIMARY KEY CHECK (name ~ '^[0-9]{4}-[0-9]{2}$'),
    starts_at    timestamptz NOT NULL UNIQUE,
    ends_at      timestamptz NOT NULL UNIQUE,
    time_zone    text        NOT NULL,
    made_at      timestamptz NOT NULL,
    -- all of these at once, by whoever closes it
    closed_at    timestamptz,
    closed_by    text,         -- who asked for it; null: it had settled
    overruled    jsonb,        -- what it was closed in spite of
    terms        jsonb,        -- the measures and kinds it was frozen by
    lines        bigint,
    totals       jsonb,        -- of each measure, whole numbers
    sha256       bytea,        -- of the canonical lines (period.canonical)
    CHECK (starts_at < ends_at),
    CHECK (num_nulls(closed_at, overruled, terms, lines, totals, sha256) IN (0, 6))
);

CREATE TABLE period_line (
    period         text    NOT NULL REFERENCES period,
    ordinal        integer NOT NULL,  -- from 0, in the canonical order
    region         text    NOT NULL,
    project_id     text    NOT NULL,  -- empty where it is not known, as in the following
    resource_type  text    NOT NULL,
    state_class    text    NOT NULL,
    kind           text    NOT NULL,
    measure        text    NOT NULL,
    amount         numeric NOT NULL CHECK (amount = trunc(amount)),
    PRIMARY KEY (period, ordinal)
);
CREATE INDEX period_line_project ON period_line (period, project_id, ordinal);

-- what folds did to closed periods, in their own transactions; only ever appended, and taken away as it is written as
-- adjustments. Amounts are texts in `changes`: [[project, state class, kind, measure, amount], ...]
CREATE TABLE period_change (
    id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    period         text        NOT NULL,
    region         text        NOT NULL,
    resource_type  text        NOT NULL,
    resource_id    text        NOT NULL,
    changes        jsonb       NOT NULL,
    evidence       jsonb       NOT NULL,
    noticed_at     timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE period_adjustment (
    id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    period         text        NOT NULL REFERENCES period,
    charged_to     text        NOT NULL REFERENCES period,
    region         text        NOT NULL,
    project_id     text        NOT NULL,
    resource_type  text        NOT NULL,
    state_class    text        NOT NULL,
    kind           text        NOT NULL,
    measure        text        NOT NULL,
    delta          numeric     NOT NULL CHECK (delta <> 0 AND delta = trunc(delta)),
    resource_id    text        NOT NULL,
    messages       integer     NOT NULL,  -- how many brought it about
    evidence       jsonb       NOT NULL,  -- the first of them
    noticed_at     timestamptz NOT NULL,
    written_at     timestamptz NOT NULL DEFAULT now(),
    CHECK (period <> charged_to)
);
CREATE INDEX period_adjustment_period ON period_adjustment (period, id);
CREATE INDEX period_adjustment_charged_to ON period_adjustment (charged_to, id);
CREATE INDEX period_adjustment_project ON period_adjustment (project_id, id);

-- whatever a program believes: what is closed stays as it is
CREATE FUNCTION period_is_frozen() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is never edited: what is closed is corrected by an adjustment', TG_TABLE_NAME
        USING ERRCODE = 'integrity_constraint_violation';
END
$$;
CREATE TRIGGER frozen BEFORE UPDATE OR DELETE OR TRUNCATE ON period_line
    FOR EACH STATEMENT EXECUTE FUNCTION period_is_frozen();
CREATE TRIGGER frozen BEFORE UPDATE OR DELETE OR TRUNCATE ON period_adjustment
    FOR EACH STATEMENT EXECUTE FUNCTION period_is_frozen();
CREATE TRIGGER frozen BEFORE UPDATE OR DELETE ON period
    FOR EACH ROW WHEN (OLD.closed_at IS NOT NULL) EXECUTE FUNCTION period_is_frozen();

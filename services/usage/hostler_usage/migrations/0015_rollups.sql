-- Sums of whole UTC days, for questions over months: for every day before rollup_state.until, exactly what the
-- intervals and amounts of that day add up to. The fold changes both in one transaction.
CREATE TABLE usage_day (
    day            date    NOT NULL,
    region         text    NOT NULL,
    project_id     text    NOT NULL,  -- empty where it is not known
    resource_type  text    NOT NULL,
    measure        text    NOT NULL,
    amount         numeric NOT NULL,
    PRIMARY KEY (day, region, project_id, resource_type, measure)
);

CREATE TABLE rollup_state (
    is_row  boolean PRIMARY KEY DEFAULT true CHECK (is_row),  -- there is one
    until   date    NOT NULL
);

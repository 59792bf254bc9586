-- Nodes, their counters, and the claims on them.
--
-- The row of `node` is the lock of everything that belongs to the node: whoever changes a counter or a live claim of it
-- has locked that row first, and holds at most one such lock while waiting for another (a report: in order of id).

-- The newest report of each host, and which of its parts have arrived.
CREATE TABLE host (
    host         text        PRIMARY KEY,
    report_id    uuid        NOT NULL,
    reported_at  timestamptz NOT NULL,
    received_at  timestamptz NOT NULL,
    parts        integer     NOT NULL,
    parts_seen   integer[]   NOT NULL
);

CREATE TABLE node (
    id                  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- identity where there is one; (host, hypervisor_hostname) is only where the node is to be found now
    node_uuid           uuid        UNIQUE,
    host                text        NOT NULL,
    hypervisor_hostname text        NOT NULL,
    hypervisor_type     text        NOT NULL,
    bare_metal          boolean     NOT NULL,
    disabled            boolean     NOT NULL,
    available           boolean     NOT NULL,
    -- bare metal that its proxy reports as in use: full when no claim covers it
    reported_taken      boolean     NOT NULL,
    reported_state      text,
    zone                text,
    traits              text[]      NOT NULL,
    report_id           uuid        NOT NULL,
    reported_at         timestamptz NOT NULL,
    received_at         timestamptz NOT NULL,
    -- set when a whole report of its host did not name it
    absent_since        timestamptz,
    -- the transaction that changed the node or its counters last: readers ask for what changed since their snapshot
    changed_in          xid8        NOT NULL DEFAULT pg_current_xact_id()
);
CREATE UNIQUE INDEX node_address ON node (host, hypervisor_hostname) WHERE absent_since IS NULL;

CREATE TABLE inventory (
    node_id         bigint NOT NULL REFERENCES node (id),
    resource_class  text   NOT NULL,
    total           bigint NOT NULL CHECK (total >= 0),
    reserved        bigint NOT NULL CHECK (reserved >= 0),
    reported_used   bigint NOT NULL CHECK (reported_used >= 0),
    -- (total - reserved) * ratio
    capacity        bigint NOT NULL CHECK (capacity >= 0),
    -- the sum of the live claims' vectors
    claimed         bigint NOT NULL DEFAULT 0 CHECK (claimed >= 0),
    -- used according to the host, and not covered by any live claim
    foreign_used    bigint NOT NULL CHECK (foreign_used >= 0),
    -- The last guard, behind the guard in each claim's own statement. It is the capacity, except where a report lowered
    -- the capacity below what was claimed already: then it is what was claimed, so that nothing can be added.
    claim_ceiling   bigint NOT NULL,
    PRIMARY KEY (node_id, resource_class),
    CONSTRAINT never_overcommitted CHECK (claimed <= claim_ceiling)
) WITH (fillfactor = 70);

CREATE TABLE claim (
    id                     uuid        PRIMARY KEY,
    number                 bigint      GENERATED ALWAYS AS IDENTITY UNIQUE,
    node_id                bigint      NOT NULL REFERENCES node (id),
    state                  text        NOT NULL CHECK (state IN ('held', 'confirmed', 'released', 'expired')),
    consumer_id            uuid        NOT NULL,
    project_id             text        NOT NULL,
    flavor                 text,
    -- exactly what was taken, and what ending the claim gives back
    resources              jsonb       NOT NULL,
    overhead_mb            bigint      NOT NULL,
    overhead_model         text        NOT NULL,
    overhead_model_version integer     NOT NULL,
    created_at             timestamptz NOT NULL,
    expires_at             timestamptz NOT NULL,
    confirmed_at           timestamptz,
    ended_at               timestamptz,
    CHECK ((state IN ('released', 'expired')) = (ended_at IS NOT NULL))
);
CREATE INDEX claim_live ON claim (node_id) WHERE state IN ('held', 'confirmed');
CREATE INDEX claim_due ON claim (expires_at) WHERE state = 'held';
CREATE INDEX claim_consumer ON claim (consumer_id);

CREATE TABLE flavor (
    name        text        PRIMARY KEY,
    generation  bigint      NOT NULL DEFAULT 1,
    memory_mb   bigint      NOT NULL CHECK (memory_mb > 0),
    vcpus       bigint      NOT NULL CHECK (vcpus > 0),
    disk_gb     bigint      NOT NULL CHECK (disk_gb >= 0),
    extra       jsonb       NOT NULL,
    vm_type     text,
    kind        text        NOT NULL CHECK (kind IN ('guest', 'node')),
    match       text        NOT NULL CHECK (match IN ('exact', 'at_least')),
    updated_at  timestamptz NOT NULL DEFAULT now()
);

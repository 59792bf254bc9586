-- Nodes, their leases, and the operations on them.

CREATE TABLE node (
    id                  uuid        PRIMARY KEY,
    name                text        NOT NULL UNIQUE,   -- hypervisor_hostname in host reports
    generation          bigint      NOT NULL DEFAULT 1,
    address             text        NOT NULL UNIQUE,   -- two nodes never share a BMC
    username            text        NOT NULL,
    sealed_password     bytea       NOT NULL,
    sealed_group_key    bytea,
    cipher_suites       integer[]   NOT NULL,
    working_suite       integer,
    memory_mb           bigint      NOT NULL CHECK (memory_mb > 0),
    vcpus               integer     NOT NULL CHECK (vcpus > 0),
    local_gb            bigint      NOT NULL CHECK (local_gb >= 0),
    cpu_arch            text,
    zone                text,
    traits              text[]      NOT NULL DEFAULT '{}',
    extra_specs         jsonb       NOT NULL DEFAULT '{}',
    maintenance         boolean     NOT NULL DEFAULT false,
    maintenance_reason  text,
    power_state         text        NOT NULL DEFAULT 'unknown' CHECK (power_state IN ('on', 'off', 'unknown')),
    last_power_state    text        CHECK (last_power_state IN ('on', 'off')),
    power_observed_at   timestamptz,
    looked_at           timestamptz,   -- the last look, whether or not the BMC answered
    poll_failures       integer     NOT NULL DEFAULT 0,
    poll_error          text,
    next_poll_at        timestamptz NOT NULL DEFAULT now(),
    latched_at          timestamptz,
    -- the process that talks to the node's BMC now; a dead one is replaced when its time is over
    driver_id           uuid,
    driver_until        timestamptz,
    created_at          timestamptz NOT NULL DEFAULT now(),
    updated_at          timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX node_due ON node (next_poll_at) WHERE latched_at IS NULL;

CREATE SEQUENCE fencing_token;

CREATE TABLE lease (
    node_id        uuid        PRIMARY KEY REFERENCES node ON DELETE CASCADE,
    owner          text        NOT NULL,
    purpose        text        NOT NULL,
    fencing_token  bigint      NOT NULL,
    taken_at       timestamptz NOT NULL DEFAULT now(),
    expires_at     timestamptz NOT NULL
);
CREATE INDEX lease_expires_at ON lease (expires_at);

CREATE TABLE operation (
    id             uuid        PRIMARY KEY,
    node_id        uuid        NOT NULL REFERENCES node ON DELETE CASCADE,
    kind           text        NOT NULL CHECK (kind IN ('power', 'boot_device')),
    args           jsonb       NOT NULL,
    state          text        NOT NULL DEFAULT 'queued'
                   CHECK (state IN ('queued', 'issuing', 'waiting', 'succeeded', 'failed')),
    fencing_token  bigint,
    requested_by   text        NOT NULL,
    created_at     timestamptz NOT NULL DEFAULT now(),
    issued_at      timestamptz,
    deadline_at    timestamptz NOT NULL,
    finished_at    timestamptz,
    code           text,
    detail         text,
    CHECK ((finished_at IS NOT NULL) = (state IN ('succeeded', 'failed')))
);
-- one operation at a time on a node
CREATE UNIQUE INDEX operation_unfinished ON operation (node_id) WHERE finished_at IS NULL;
CREATE INDEX operation_of_node ON operation (node_id, created_at DESC);
CREATE INDEX operation_finished_at ON operation (finished_at);

-- One row: which version of the inventory was changed to, and which was reported to capacity.
CREATE TABLE inventory (
    only_row      boolean     PRIMARY KEY DEFAULT true CHECK (only_row),
    version       bigint      NOT NULL DEFAULT 1,
    reported      bigint      NOT NULL DEFAULT 0,
    reported_at   timestamptz
);
INSERT INTO inventory DEFAULT VALUES;

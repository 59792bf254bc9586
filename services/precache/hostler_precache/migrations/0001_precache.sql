-- Images that some lister or request named, and where their bytes are.
CREATE TABLE image (
    image_id text PRIMARY KEY,
    name text,
    fetcher text NOT NULL,
    location text NOT NULL DEFAULT '',
    size_bytes bigint CHECK (size_bytes >= 0),
    disk_format text,
    hash_algorithm text,
    hash_value text,
    created_at timestamptz NOT NULL DEFAULT now(),
    CHECK ((hash_algorithm IS NULL) = (hash_value IS NULL))
);

-- The bytes of an image as they are served. The id is chosen before the bytes are known; root and
-- manifest are there once the source's own hash was checked, and never change after that.
CREATE TABLE blob (
    blob_id uuid PRIMARY KEY,
    image_id text NOT NULL REFERENCES image,
    state text NOT NULL CHECK (state IN ('fetching', 'ready', 'error')),
    reason text,
    seed text NOT NULL,
    seed_url text NOT NULL,
    swarm_key bytea NOT NULL,
    attempts integer NOT NULL DEFAULT 1,
    lease_until timestamptz NOT NULL,
    fetched_bytes bigint NOT NULL DEFAULT 0,
    size_bytes bigint,
    root bytea,
    manifest bytea,
    verification text,
    created_at timestamptz NOT NULL DEFAULT now(),
    ready_at timestamptz,
    CHECK (state <> 'ready' OR (root IS NOT NULL AND manifest IS NOT NULL AND size_bytes IS NOT NULL))
);
CREATE UNIQUE INDEX blob_live ON blob (image_id) WHERE state IN ('fetching', 'ready');
CREATE INDEX blob_lease ON blob (lease_until) WHERE state = 'fetching';

-- What puts images on hosts again and again.
CREATE TABLE policy (
    policy_id uuid PRIMARY KEY,
    name text NOT NULL UNIQUE,
    lister text NOT NULL,
    options jsonb NOT NULL,
    hosts text[],
    priority integer NOT NULL,
    every_seconds integer NOT NULL CHECK (every_seconds > 0),
    next_run_at timestamptz NOT NULL DEFAULT now(),
    last_run_at timestamptz,
    last_outcome text,
    last_detail text,
    created_at timestamptz NOT NULL DEFAULT now()
);

-- An image wanted on hosts; hosts NULL means all there are or will be.
CREATE TABLE distribution (
    distribution_id uuid PRIMARY KEY,
    image_id text NOT NULL REFERENCES image,
    blob_id uuid REFERENCES blob,
    policy_id uuid REFERENCES policy ON DELETE SET NULL,
    hosts text[],
    priority integer NOT NULL,
    state text NOT NULL CHECK (state IN ('fetching', 'distributing', 'done', 'error', 'cancelled')),
    reason text,
    created_at timestamptz NOT NULL DEFAULT now(),
    announced_at timestamptz,
    finished_at timestamptz
);
CREATE INDEX distribution_created ON distribution (created_at DESC, distribution_id);
CREATE INDEX distribution_blob ON distribution (blob_id);
CREATE INDEX distribution_image ON distribution (image_id) WHERE state = 'fetching';

-- Where each host is with each distribution it belongs to.
CREATE TABLE distribution_host (
    distribution_id uuid NOT NULL REFERENCES distribution ON DELETE CASCADE,
    host text NOT NULL,
    state text NOT NULL DEFAULT 'waiting'
        CHECK (state IN ('waiting', 'transferring', 'cached', 'existing', 'error', 'unsupported', 'skipped')),
    reason text,
    pieces_done integer NOT NULL DEFAULT 0,
    bytes_done bigint NOT NULL DEFAULT 0,
    updated_at timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz,
    PRIMARY KEY (distribution_id, host)
);
CREATE INDEX distribution_host_host ON distribution_host (host);

-- What each process of a seed or an agent sent and received for a distribution, as it counted
-- itself. Totals of one session: reporting them twice changes nothing.
CREATE TABLE transfer (
    distribution_id uuid NOT NULL REFERENCES distribution ON DELETE CASCADE,
    host text NOT NULL,
    session_id uuid NOT NULL,
    is_seed boolean NOT NULL,
    sent_bytes bigint NOT NULL DEFAULT 0,
    received_from_seed_bytes bigint NOT NULL DEFAULT 0,
    received_from_peers_bytes bigint NOT NULL DEFAULT 0,
    wasted_bytes bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (distribution_id, host, session_id)
);

-- Hosts that an agent has spoken for.
CREATE TABLE host (
    host text PRIMARY KEY,
    url text NOT NULL,
    session_id uuid NOT NULL,
    free_bytes bigint,
    first_seen_at timestamptz NOT NULL DEFAULT now(),
    seen_at timestamptz NOT NULL DEFAULT now()
);

-- Who has, or is getting, which blob: the swarm.
CREATE TABLE member (
    blob_id uuid NOT NULL REFERENCES blob ON DELETE CASCADE,
    host text NOT NULL,
    url text NOT NULL,
    pieces_done integer NOT NULL,
    banned text[] NOT NULL DEFAULT '{}',
    seen_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (blob_id, host)
);

CREATE TABLE items (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    title text NOT NULL,
    body text NOT NULL,
    version integer NOT NULL DEFAULT 1,
    created_by bigint NOT NULL REFERENCES members,
    updated_by bigint NOT NULL REFERENCES members,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    search tsvector NOT NULL GENERATED ALWAYS AS (
        setweight(to_tsvector('english', title), 'A') || setweight(to_tsvector('english', body), 'B')
    ) STORED
);
CREATE INDEX items_search ON items USING gin (search);
CREATE INDEX items_updated ON items (updated_at DESC, id DESC);

CREATE TABLE comments (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    item_id bigint NOT NULL REFERENCES items ON DELETE CASCADE,
    member_id bigint NOT NULL REFERENCES members,
    body text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX comments_item ON comments (item_id, id);

-- What happened, newest last. The title is kept because the item may be gone.
CREATE TABLE activities (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT now(),
    kind text NOT NULL,
    member_id bigint NOT NULL REFERENCES members,
    item_id bigint,
    title text NOT NULL DEFAULT ''
);
CREATE INDEX activities_item ON activities (item_id, id DESC);

CREATE TABLE stats (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT now(),
    member_id bigint NOT NULL REFERENCES members ON DELETE CASCADE,
    name text NOT NULL,
    value jsonb NOT NULL
);
CREATE INDEX stats_at ON stats (at);

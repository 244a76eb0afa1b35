CREATE TABLE members (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    login text NOT NULL CHECK (login = lower(login)),
    name text NOT NULL,
    email text NOT NULL DEFAULT '',
    role text NOT NULL CHECK (role IN ('administrator', 'member')),
    -- The rings in which a change reaches people.
    user_group text NOT NULL DEFAULT 'all' CHECK (user_group IN ('qa', 'kerio', 'early-access', 'all')),
    timezone text NOT NULL DEFAULT 'UTC',
    -- NULL until an invitation is accepted.
    password_hash text,
    -- Raised with every new password, which ends the sessions that rest on an older one.
    password_version integer NOT NULL DEFAULT 1,
    must_change_password boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX members_login ON members (login);

CREATE TABLE invitations (
    -- sha256 of the link's token: reading the table gives nobody a valid link.
    token_key text PRIMARY KEY,
    member_id bigint NOT NULL REFERENCES members ON DELETE CASCADE,
    invited_by bigint NOT NULL REFERENCES members,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL
);
CREATE INDEX invitations_member ON invitations (member_id);

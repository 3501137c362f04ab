-- What taskd keeps, and the truth about it: executed at the first start, compared with the database at every
-- start and with the Peewee models by a test. migrations/ bring a database of an earlier version up to it.

CREATE TABLE task (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,  -- unique across all users, never reused after a delete
    user_id     TEXT NOT NULL,                      -- the owner: the token's sub, exactly as it was signed
    title       TEXT NOT NULL,                      -- 1 to 200 characters, exactly as sent
    description TEXT,                               -- at most 10,000 characters, or null
    completed   BOOLEAN NOT NULL DEFAULT FALSE,
    created_at  TEXT NOT NULL,                      -- RFC 3339, UTC, milliseconds: 2026-11-20T21:00:00.000Z
    updated_at  TEXT NOT NULL,                      -- the same; the last change
    version     INTEGER NOT NULL DEFAULT 1,         -- counts the changes; with updated_at it makes the ETag
    title_folded       TEXT NOT NULL DEFAULT '',    -- the title without upper case, in which q is searched
    description_folded TEXT                         -- the description without upper case
);

-- Every statement names the owner first. The order of a list, and whether it has only open or only done tasks, is
-- in an index, so that a page costs the same wherever it is.
CREATE INDEX task_id ON task (user_id, id);
CREATE INDEX task_completed_id ON task (user_id, completed, id);
CREATE INDEX task_completed_created_at ON task (user_id, completed, created_at, id);
CREATE INDEX task_completed_updated_at ON task (user_id, completed, updated_at, id);
CREATE INDEX task_completed_title ON task (user_id, completed, title, id);

CREATE TABLE idempotency_key (                      -- a create that can be repeated for 24 hours
    id          INTEGER PRIMARY KEY AUTOINCREMENT,  -- in the order of time, so that the oldest are found first
    user_id     TEXT NOT NULL,
    name        TEXT NOT NULL,                      -- what the Idempotency-Key header said
    body        TEXT NOT NULL,                      -- SHA-256 of the task that was asked for
    answer      TEXT NOT NULL,                      -- the task as it was created, in JSON
    created_at  TEXT NOT NULL,                      -- RFC 3339
    UNIQUE (user_id, name)
);

CREATE TABLE about (                                -- one row
    version     INTEGER NOT NULL,                   -- of this schema
    cursor_key  TEXT NOT NULL                       -- signs the cursors of pages
);

-- The tables of taskd. This file is executed at the first start, and compared with the database at
-- every start; a test compares it with the Peewee models. The files in migrations/ bring a database
-- of an earlier version up to it.

CREATE TABLE task (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,  -- unique across all users, never reused
    user_id     TEXT NOT NULL,                      -- the owner: the token's sub, exactly as signed
    title       TEXT NOT NULL,                      -- 1 to 200 characters, exactly as sent
    description TEXT,                               -- at most 10,000 characters, or null
    completed   BOOLEAN NOT NULL DEFAULT FALSE,
    priority    TEXT,                               -- low, medium or high, or null
    due_date    TEXT,                               -- RFC 3339: a day, or a UTC time, or null
    tags        TEXT NOT NULL DEFAULT '[]',         -- a JSON array; " and , in it are escaped
    created_at  TEXT NOT NULL,                      -- RFC 3339: 2026-11-20T21:00:00.000Z
    updated_at  TEXT NOT NULL,                      -- the same; the last change
    version     INTEGER NOT NULL DEFAULT 1,         -- counts the changes; part of the ETag
    title_folded       TEXT NOT NULL DEFAULT '',    -- the title, case-folded, for the search q
    description_folded TEXT,                        -- the description, case-folded
    tags_folded        TEXT NOT NULL DEFAULT ''     -- the tags, case-folded, joined by "A"
);

-- Every statement on tasks names the owner. Sorted by id, a list of all, open or done tasks follows
-- an index, so that every page costs the same. Other orders sort the user's tasks.
CREATE INDEX task_id ON task (user_id, id);
CREATE INDEX task_completed_id ON task (user_id, completed, id);

CREATE TABLE idempotency_key (                      -- a create that can be repeated for 24 hours
    id          INTEGER PRIMARY KEY AUTOINCREMENT,  -- in order of time: the oldest come first
    user_id     TEXT NOT NULL,
    name        TEXT NOT NULL,                      -- the value of the Idempotency-Key header
    body        TEXT NOT NULL,                      -- SHA-256 of the task in the request
    answer      TEXT NOT NULL,                      -- the task as it was created, in JSON
    created_at  TEXT NOT NULL,                      -- RFC 3339
    UNIQUE (user_id, name)
);

CREATE TABLE about (                                -- one row
    version     INTEGER NOT NULL,                   -- of this schema
    cursor_key  TEXT NOT NULL                       -- signs the cursors of pages
);

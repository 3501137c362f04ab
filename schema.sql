-- What taskd keeps, and the truth about it: executed at the first start, compared with the database at every
-- start and with the Peewee models by a test. migrations/ bring a database of an earlier version up to it.

CREATE TABLE task (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,  -- unique across all users, never reused after a delete
    user_id     TEXT NOT NULL,                      -- the owner: the token's sub, exactly as it was signed
    title       TEXT NOT NULL,                      -- 1 to 200 characters, exactly as sent
    description TEXT,                               -- at most 10,000 characters, or null
    completed   BOOLEAN NOT NULL DEFAULT FALSE,
    priority    TEXT,                               -- low, medium or high, or null
    due_date    TEXT,                               -- RFC 3339: a day, or a time in UTC with milliseconds, or null
    tags        TEXT NOT NULL DEFAULT '[]',         -- a JSON array of texts, in which " and , are escaped
    created_at  TEXT NOT NULL,                      -- RFC 3339, UTC, milliseconds: 2026-11-20T21:00:00.000Z
    updated_at  TEXT NOT NULL,                      -- the same; the last change
    version     INTEGER NOT NULL DEFAULT 1,         -- counts the changes; with updated_at it makes the ETag
    title_folded       TEXT NOT NULL DEFAULT '',    -- the title, case-folded: q searches this copy
    description_folded TEXT,                        -- the description, case-folded
    tags_folded        TEXT NOT NULL DEFAULT ''     -- the tags, case-folded, with an A between two of them
);

-- Every statement names the owner first. Sorted by id, a list of all, open or done tasks follows an index, so that a
-- page costs the same wherever it is. Other orders sort the user's tasks.
CREATE INDEX task_id ON task (user_id, id);
CREATE INDEX task_completed_id ON task (user_id, completed, id);

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

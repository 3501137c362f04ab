-- From version 1 to version 2: entity tags, search, idempotency keys, an index for each order of a
-- list. casefold() is a function of taskd.

ALTER TABLE task ADD COLUMN version INTEGER NOT NULL DEFAULT 1;
ALTER TABLE task ADD COLUMN title_folded TEXT NOT NULL DEFAULT '';
ALTER TABLE task ADD COLUMN description_folded TEXT;
UPDATE task SET title_folded = casefold(title), description_folded = casefold(description);

DROP INDEX IF EXISTS task_user_id_id;
CREATE INDEX task_id ON task (user_id, id);
CREATE INDEX task_completed_id ON task (user_id, completed, id);
CREATE INDEX task_completed_created_at ON task (user_id, completed, created_at, id);
CREATE INDEX task_completed_updated_at ON task (user_id, completed, updated_at, id);
CREATE INDEX task_completed_title ON task (user_id, completed, title, id);

CREATE TABLE idempotency_key (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id     TEXT NOT NULL,
    name        TEXT NOT NULL,
    body        TEXT NOT NULL,
    answer      TEXT NOT NULL,
    created_at  TEXT NOT NULL,
    UNIQUE (user_id, name)
);

CREATE TABLE about (
    version     INTEGER NOT NULL,
    cursor_key  TEXT NOT NULL
);

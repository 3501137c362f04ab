-- What taskd keeps, and the truth about it: executed at the first start, compared with the database at every
-- start and with the Peewee model by a test.

CREATE TABLE task (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,  -- unique across all users, never reused after a delete
    user_id     TEXT NOT NULL,                      -- the owner: the token's sub, exactly as it was signed
    title       TEXT NOT NULL,                      -- 1 to 200 characters, exactly as sent
    description TEXT,                               -- at most 10,000 characters, or null
    completed   BOOLEAN NOT NULL DEFAULT FALSE,
    created_at  TEXT NOT NULL,                      -- RFC 3339, UTC, milliseconds: 2026-11-20T21:00:00.000Z
    updated_at  TEXT NOT NULL                       -- the same; the last change
);

CREATE INDEX task_user_id_id ON task (user_id, id);  -- every statement names the owner first

INSERT INTO task VALUES (1, 'alice', 'Buy milk', '2 litres', FALSE, '2026-11-01T08:00:00.000Z', '2026-11-01T08:00:00.000Z');
INSERT INTO task VALUES (2, 'bob', 'Hauptstraße 5', NULL, TRUE, '2026-11-01T08:00:00.001Z', '2026-11-02T09:30:00.250Z');
INSERT INTO task VALUES (5, 'alice', 'ÉCOLE  " '' % _', 'Σίσυφος' || char(10) || '🌧', TRUE, '2026-11-03T00:00:00.000Z', '2026-11-03T00:00:00.999Z');
INSERT INTO task VALUES (9, 'carol', 'gone', NULL, FALSE, '2026-11-03T00:00:00.000Z', '2026-11-03T00:00:00.000Z');
DELETE FROM task WHERE id = 9;

-- Made by 0.2.0 on SQLite, and dumped. Its keys are as old as it is: a test that replays them renews them.
CREATE TABLE about (                                -- one row
    version     INTEGER NOT NULL,                   -- of this schema
    cursor_key  TEXT NOT NULL                       -- signs the cursors of pages
);
INSERT INTO "about" VALUES(2,'9b241646e7a2f506dee519b1961c2e369732dcf6b2a3c72e0ba399ca65211463');
CREATE TABLE idempotency_key (                      -- a create that can be repeated for 24 hours
    id          INTEGER PRIMARY KEY AUTOINCREMENT,  -- in the order of time, so that the oldest are found first
    user_id     TEXT NOT NULL,
    name        TEXT NOT NULL,                      -- what the Idempotency-Key header said
    body        TEXT NOT NULL,                      -- SHA-256 of the task that was asked for
    answer      TEXT NOT NULL,                      -- the task as it was created, in JSON
    created_at  TEXT NOT NULL,                      -- RFC 3339
    UNIQUE (user_id, name)
);
INSERT INTO "idempotency_key" VALUES(1,'alice','key-1','4c53be9537366c17b5920d2a4c4a1a5705744ef49486e2f094a0b31ff06c9be2','{"id":1,"user_id":"alice","title":"Buy milk","description":"2 litres","completed":false,"created_at":"2026-11-25T04:35:02.375Z","updated_at":"2026-11-25T04:35:02.375Z"}','2026-11-25T04:35:02.375Z');
INSERT INTO "idempotency_key" VALUES(2,'bob','key-1','2b923bf5996740fe36c47a09586d67dfc2dad964774af7461946ab1f4b02b2e0','{"id":2,"user_id":"bob","title":"Hauptstraße 5","description":null,"completed":false,"created_at":"2026-11-25T04:35:02.381Z","updated_at":"2026-11-25T04:35:02.381Z"}','2026-11-25T04:35:02.381Z');
INSERT INTO "idempotency_key" VALUES(3,'alice','key-2','7ede740688b5c950f88196ce072b44689c10dd54e279633355d3414dbd55b8e3','{"id":3,"user_id":"alice","title":"ÉCOLE  \" '' % _","description":"Σίσυφος\n🌧","completed":true,"created_at":"2026-11-25T04:35:02.385Z","updated_at":"2026-11-25T04:35:02.385Z"}','2026-11-25T04:35:02.385Z');
INSERT INTO "idempotency_key" VALUES(4,'alice','key-3','7f42e18b965c0587c9f85dccdc399c7b9a5f0dd431421bc35a72fb4233800fa8','{"id":4,"user_id":"alice","title":"changed since","description":null,"completed":false,"created_at":"2026-11-25T04:35:02.387Z","updated_at":"2026-11-25T04:35:02.387Z"}','2026-11-25T04:35:02.387Z');
INSERT INTO "idempotency_key" VALUES(5,'carol','key-4','4e6d41ddd07d2425733ee735e7eafd465d48677162469941576440f73e4171d4','{"id":5,"user_id":"carol","title":"deleted since","description":null,"completed":false,"created_at":"2026-11-25T04:35:02.389Z","updated_at":"2026-11-25T04:35:02.389Z"}','2026-11-25T04:35:02.389Z');
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
INSERT INTO "task" VALUES(1,'alice','Buy milk','2 litres',0,'2026-11-25T04:35:02.375Z','2026-11-25T04:35:02.375Z',1,'buy milk','2 litres');
INSERT INTO "task" VALUES(2,'bob','Hauptstraße 5',NULL,1,'2026-11-25T04:35:02.381Z','2026-11-25T04:35:02.394Z',2,'hauptstrasse 5',NULL);
INSERT INTO "task" VALUES(3,'alice','ÉCOLE  " '' % _','Σίσυφος
🌧',1,'2026-11-25T04:35:02.385Z','2026-11-25T04:35:02.385Z',1,'école  " '' % _','σίσυφοσ
🌧');
INSERT INTO "task" VALUES(4,'alice','changed since','now with a description',0,'2026-11-25T04:35:02.387Z','2026-11-25T04:35:02.393Z',2,'changed since','now with a description');
INSERT INTO "task" VALUES(6,'alice','without a key',NULL,1,'2026-11-25T04:35:02.390Z','2026-11-25T04:35:02.390Z',1,'without a key',NULL);
CREATE INDEX task_id ON task (user_id, id);
CREATE INDEX task_completed_id ON task (user_id, completed, id);
CREATE INDEX task_completed_created_at ON task (user_id, completed, created_at, id);
CREATE INDEX task_completed_updated_at ON task (user_id, completed, updated_at, id);
CREATE INDEX task_completed_title ON task (user_id, completed, title, id);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('idempotency_key',5);
INSERT INTO "sqlite_sequence" VALUES('task',7);

-- From version 2 to version 3: priority, due date and tags; only the order by id keeps its indexes.

ALTER TABLE task ADD COLUMN priority TEXT;
ALTER TABLE task ADD COLUMN due_date TEXT;
ALTER TABLE task ADD COLUMN tags TEXT NOT NULL DEFAULT '[]';
ALTER TABLE task ADD COLUMN tags_folded TEXT NOT NULL DEFAULT '';

DROP INDEX IF EXISTS task_completed_created_at;
DROP INDEX IF EXISTS task_completed_updated_at;
DROP INDEX IF EXISTS task_completed_title;

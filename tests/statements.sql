-- The statements that taskd runs for a user, as Peewee compiles them: `make statements`.
-- Where PostgreSQL's text differs it follows. Its placeholders are %(name)s in place of :name.
-- Of the pages of lists there are the orders, and each filter once; filters are joined by AND.

-- get
SELECT "t1"."id", "t1"."user_id", "t1"."title", "t1"."description", "t1"."completed", "t1"."priority", "t1"."due_date", "t1"."tags", "t1"."created_at", "t1"."updated_at", "t1"."version"
  FROM "task" AS "t1"
  WHERE (("t1"."user_id" = :user_id)
  AND ("t1"."id" = :id));

-- add
INSERT INTO "task" ("user_id", "created_at", "updated_at", "title", "description", "completed", "priority", "due_date", "tags", "title_folded", "description_folded", "tags_folded")
  VALUES (:user_id, :now, :now, :title, :description, :completed, :priority, :due_date, :tags, :title_folded, :description_folded, :tags_folded)
  RETURNING "task"."id", "task"."user_id", "task"."title", "task"."description", "task"."completed", "task"."priority", "task"."due_date", "task"."tags", "task"."created_at", "task"."updated_at", "task"."version";

-- over_first_page
SELECT "t1"."id"
  FROM "task" AS "t1"
  WHERE ("t1"."user_id" = :user_id)
  LIMIT 1 OFFSET 100;

-- count
SELECT COUNT(1)
  FROM (SELECT "t1"."id"
  FROM "task" AS "t1"
  WHERE ("t1"."user_id" = :user_id)
  LIMIT :limit) AS "t2";

-- toggle
UPDATE "task"
  SET "updated_at" = CASE WHEN updated_at > :now THEN updated_at ELSE :now END, "version" = version + 1, "completed" = NOT completed
  WHERE ((("task"."user_id" = :user_id)
  AND ("task"."id" = :id))
  AND ((:match = '*' OR :match LIKE '%"' || version || '-' || updated_at || '"%')
  AND NOT (:none_match = '*' OR :none_match LIKE '%"' || version || '-' || updated_at || '"%')))
  RETURNING "task"."id", "task"."user_id", "task"."title", "task"."description", "task"."completed", "task"."priority", "task"."due_date", "task"."tags", "task"."created_at", "task"."updated_at", "task"."version";

-- remove
DELETE
  FROM "task"
  WHERE ((("task"."user_id" = :user_id)
  AND ("task"."id" = :id))
  AND ((:match = '*' OR :match LIKE '%"' || version || '-' || updated_at || '"%')
  AND NOT (:none_match = '*' OR :none_match LIKE '%"' || version || '-' || updated_at || '"%')))
  RETURNING "task"."id", "task"."user_id", "task"."title", "task"."description", "task"."completed", "task"."priority", "task"."due_date", "task"."tags", "task"."created_at", "task"."updated_at", "task"."version";

-- delete_old_key
DELETE
  FROM "idempotency_key"
  WHERE ((("idempotency_key"."user_id" = :user_id)
  AND ("idempotency_key"."name" = :name))
  AND ("idempotency_key"."created_at" < :before));

-- old_key_ids
SELECT "t1"."id"
  FROM "idempotency_key" AS "t1"
  WHERE ("t1"."created_at" < :before)
  ORDER BY "t1"."id"
  LIMIT 500;

-- delete_old_keys
DELETE
  FROM "idempotency_key"
  WHERE (("idempotency_key"."created_at" < :before)
  AND ("idempotency_key"."id" BETWEEN :first
  AND :last));

-- add_key
INSERT INTO "idempotency_key" ("user_id", "name", "body", "answer", "created_at")
  VALUES (:user_id, :name, :body, :answer, :now);

-- replay
SELECT "t1"."body", "t1"."answer"
  FROM "idempotency_key" AS "t1"
  WHERE (("t1"."user_id" = :user_id)
  AND ("t1"."name" = :name));

-- change title
UPDATE "task"
  SET "updated_at" = CASE WHEN updated_at > :now THEN updated_at ELSE :now END, "version" = version + 1, "title" = :title, "title_folded" = :title_folded
  WHERE ((("task"."user_id" = :user_id)
  AND ("task"."id" = :id))
  AND ((:match = '*' OR :match LIKE '%"' || version || '-' || updated_at || '"%')
  AND NOT (:none_match = '*' OR :none_match LIKE '%"' || version || '-' || updated_at || '"%')))
  RETURNING "task"."id", "task"."user_id", "task"."title", "task"."description", "task"."completed", "task"."priority", "task"."due_date", "task"."tags", "task"."created_at", "task"."updated_at", "task"."version";

-- change description
UPDATE "task"
  SET "updated_at" = CASE WHEN updated_at > :now THEN updated_at ELSE :now END, "version" = version + 1, "description" = :description, "description_folded" = :description_folded
  WHERE ((("task"."user_id" = :user_id)
  AND ("task"."id" = :id))
  AND ((:match = '*' OR :match LIKE '%"' || version || '-' || updated_at || '"%')
  AND NOT (:none_match = '*' OR :none_match LIKE '%"' || version || '-' || updated_at || '"%')))
  RETURNING "task"."id", "task"."user_id", "task"."title", "task"."description", "task"."completed", "task"."priority", "task"."due_date", "task"."tags", "task"."created_at", "task"."updated_at", "task"."version";

-- change completed
UPDATE "task"
  SET "updated_at" = CASE WHEN updated_at > :now THEN updated_at ELSE :now END, "version" = version + 1, "completed" = :completed
  WHERE ((("task"."user_id" = :user_id)
  AND ("task"."id" = :id))
  AND ((:match = '*' OR :match LIKE '%"' || version || '-' || updated_at || '"%')
  AND NOT (:none_match = '*' OR :none_match LIKE '%"' || version || '-' || updated_at || '"%')))
  RETURNING "task"."id", "task"."user_id", "task"."title", "task"."description", "task"."completed", "task"."priority", "task"."due_date", "task"."tags", "task"."created_at", "task"."updated_at", "task"."version";

-- change priority
UPDATE "task"
  SET "updated_at" = CASE WHEN updated_at > :now THEN updated_at ELSE :now END, "version" = version + 1, "priority" = :priority
  WHERE ((("task"."user_id" = :user_id)
  AND ("task"."id" = :id))
  AND ((:match = '*' OR :match LIKE '%"' || version || '-' || updated_at || '"%')
  AND NOT (:none_match = '*' OR :none_match LIKE '%"' || version || '-' || updated_at || '"%')))
  RETURNING "task"."id", "task"."user_id", "task"."title", "task"."description", "task"."completed", "task"."priority", "task"."due_date", "task"."tags", "task"."created_at", "task"."updated_at", "task"."version";

-- change due_date
UPDATE "task"
  SET "updated_at" = CASE WHEN updated_at > :now THEN updated_at ELSE :now END, "version" = version + 1, "due_date" = :due_date
  WHERE ((("task"."user_id" = :user_id)
  AND ("task"."id" = :id))
  AND ((:match = '*' OR :match LIKE '%"' || version || '-' || updated_at || '"%')
  AND NOT (:none_match = '*' OR :none_match LIKE '%"' || version || '-' || updated_at || '"%')))
  RETURNING "task"."id", "task"."user_id", "task"."title", "task"."description", "task"."completed", "task"."priority", "task"."due_date", "task"."tags", "task"."created_at", "task"."updated_at", "task"."version";

-- change tags
UPDATE "task"
  SET "updated_at" = CASE WHEN updated_at > :now THEN updated_at ELSE :now END, "version" = version + 1, "tags" = :tags, "tags_folded" = :tags_folded
  WHERE ((("task"."user_id" = :user_id)
  AND ("task"."id" = :id))
  AND ((:match = '*' OR :match LIKE '%"' || version || '-' || updated_at || '"%')
  AND NOT (:none_match = '*' OR :none_match LIKE '%"' || version || '-' || updated_at || '"%')))
  RETURNING "task"."id", "task"."user_id", "task"."title", "task"."description", "task"."completed", "task"."priority", "task"."due_date", "task"."tags", "task"."created_at", "task"."updated_at", "task"."version";

-- page by id, first
SELECT "t1"."id", "t1"."user_id", "t1"."title", "t1"."description", "t1"."completed", "t1"."priority", "t1"."due_date", "t1"."tags", "t1"."created_at", "t1"."updated_at", id
  FROM "task" AS "t1"
  WHERE ("t1"."user_id" = :user_id)
  ORDER BY id
  LIMIT :limit;

-- page by id, next
SELECT "t1"."id", "t1"."user_id", "t1"."title", "t1"."description", "t1"."completed", "t1"."priority", "t1"."due_date", "t1"."tags", "t1"."created_at", "t1"."updated_at", id
  FROM "task" AS "t1"
  WHERE (("t1"."user_id" = :user_id)
  AND id > :last)
  ORDER BY id
  LIMIT :limit;

-- page by created_at, first
SELECT "t1"."id", "t1"."user_id", "t1"."title", "t1"."description", "t1"."completed", "t1"."priority", "t1"."due_date", "t1"."tags", "t1"."created_at", "t1"."updated_at", created_at
  FROM "task" AS "t1"
  WHERE ("t1"."user_id" = :user_id)
  ORDER BY created_at, id
  LIMIT :limit;

-- page by created_at, next
SELECT "t1"."id", "t1"."user_id", "t1"."title", "t1"."description", "t1"."completed", "t1"."priority", "t1"."due_date", "t1"."tags", "t1"."created_at", "t1"."updated_at", created_at
  FROM "task" AS "t1"
  WHERE (("t1"."user_id" = :user_id)
  AND (created_at, id) > (:value, :last))
  ORDER BY created_at, id
  LIMIT :limit;

-- page by updated_at, first
SELECT "t1"."id", "t1"."user_id", "t1"."title", "t1"."description", "t1"."completed", "t1"."priority", "t1"."due_date", "t1"."tags", "t1"."created_at", "t1"."updated_at", updated_at
  FROM "task" AS "t1"
  WHERE ("t1"."user_id" = :user_id)
  ORDER BY updated_at, id
  LIMIT :limit;

-- page by updated_at, next
SELECT "t1"."id", "t1"."user_id", "t1"."title", "t1"."description", "t1"."completed", "t1"."priority", "t1"."due_date", "t1"."tags", "t1"."created_at", "t1"."updated_at", updated_at
  FROM "task" AS "t1"
  WHERE (("t1"."user_id" = :user_id)
  AND (updated_at, id) > (:value, :last))
  ORDER BY updated_at, id
  LIMIT :limit;

-- page by title, first
SELECT "t1"."id", "t1"."user_id", "t1"."title", "t1"."description", "t1"."completed", "t1"."priority", "t1"."due_date", "t1"."tags", "t1"."created_at", "t1"."updated_at", title
  FROM "task" AS "t1"
  WHERE ("t1"."user_id" = :user_id)
  ORDER BY title, id
  LIMIT :limit;

-- page by title, next
SELECT "t1"."id", "t1"."user_id", "t1"."title", "t1"."description", "t1"."completed", "t1"."priority", "t1"."due_date", "t1"."tags", "t1"."created_at", "t1"."updated_at", title
  FROM "task" AS "t1"
  WHERE (("t1"."user_id" = :user_id)
  AND (title, id) > (:value, :last))
  ORDER BY title, id
  LIMIT :limit;

-- page by priority, first
SELECT "t1"."id", "t1"."user_id", "t1"."title", "t1"."description", "t1"."completed", "t1"."priority", "t1"."due_date", "t1"."tags", "t1"."created_at", "t1"."updated_at", COALESCE(CASE priority WHEN 'low' THEN '1' WHEN 'medium' THEN '2' WHEN 'high' THEN '3' END, 'z')
  FROM "task" AS "t1"
  WHERE ("t1"."user_id" = :user_id)
  ORDER BY COALESCE(CASE priority WHEN 'low' THEN '1' WHEN 'medium' THEN '2' WHEN 'high' THEN '3' END, 'z'), id
  LIMIT :limit;

-- page by priority, next
SELECT "t1"."id", "t1"."user_id", "t1"."title", "t1"."description", "t1"."completed", "t1"."priority", "t1"."due_date", "t1"."tags", "t1"."created_at", "t1"."updated_at", COALESCE(CASE priority WHEN 'low' THEN '1' WHEN 'medium' THEN '2' WHEN 'high' THEN '3' END, 'z')
  FROM "task" AS "t1"
  WHERE (("t1"."user_id" = :user_id)
  AND (COALESCE(CASE priority WHEN 'low' THEN '1' WHEN 'medium' THEN '2' WHEN 'high' THEN '3' END, 'z'), id) > (:value, :last))
  ORDER BY COALESCE(CASE priority WHEN 'low' THEN '1' WHEN 'medium' THEN '2' WHEN 'high' THEN '3' END, 'z'), id
  LIMIT :limit;

-- page by due_date, first
SELECT "t1"."id", "t1"."user_id", "t1"."title", "t1"."description", "t1"."completed", "t1"."priority", "t1"."due_date", "t1"."tags", "t1"."created_at", "t1"."updated_at", COALESCE(due_date || SUBSTR('T00:00:00.000Z', LENGTH(due_date) - 9), 'z')
  FROM "task" AS "t1"
  WHERE ("t1"."user_id" = :user_id)
  ORDER BY COALESCE(due_date || SUBSTR('T00:00:00.000Z', LENGTH(due_date) - 9), 'z'), id
  LIMIT :limit;

-- page by due_date, next
SELECT "t1"."id", "t1"."user_id", "t1"."title", "t1"."description", "t1"."completed", "t1"."priority", "t1"."due_date", "t1"."tags", "t1"."created_at", "t1"."updated_at", COALESCE(due_date || SUBSTR('T00:00:00.000Z', LENGTH(due_date) - 9), 'z')
  FROM "task" AS "t1"
  WHERE (("t1"."user_id" = :user_id)
  AND (COALESCE(due_date || SUBSTR('T00:00:00.000Z', LENGTH(due_date) - 9), 'z'), id) > (:value, :last))
  ORDER BY COALESCE(due_date || SUBSTR('T00:00:00.000Z', LENGTH(due_date) - 9), 'z'), id
  LIMIT :limit;

-- page by -id, next
SELECT "t1"."id", "t1"."user_id", "t1"."title", "t1"."description", "t1"."completed", "t1"."priority", "t1"."due_date", "t1"."tags", "t1"."created_at", "t1"."updated_at", id
  FROM "task" AS "t1"
  WHERE (("t1"."user_id" = :user_id)
  AND id < :last)
  ORDER BY id DESC
  LIMIT :limit;

-- page by -due_date, next
SELECT "t1"."id", "t1"."user_id", "t1"."title", "t1"."description", "t1"."completed", "t1"."priority", "t1"."due_date", "t1"."tags", "t1"."created_at", "t1"."updated_at", COALESCE(due_date || SUBSTR('T00:00:00.000Z', LENGTH(due_date) - 9), '')
  FROM "task" AS "t1"
  WHERE (("t1"."user_id" = :user_id)
  AND (COALESCE(due_date || SUBSTR('T00:00:00.000Z', LENGTH(due_date) - 9), ''), id) < (:value, :last))
  ORDER BY COALESCE(due_date || SUBSTR('T00:00:00.000Z', LENGTH(due_date) - 9), '') DESC, id DESC
  LIMIT :limit;

-- page with all filters
SELECT "t1"."id", "t1"."user_id", "t1"."title", "t1"."description", "t1"."completed", "t1"."priority", "t1"."due_date", "t1"."tags", "t1"."created_at", "t1"."updated_at", id
  FROM "task" AS "t1"
  WHERE ((((((((("t1"."user_id" = :user_id)
  AND completed = :completed)
  AND (REPLACE(title_folded, :q, '') <> title_folded OR REPLACE(description_folded, :q, '') <> description_folded OR REPLACE(tags_folded, :q, '') <> tags_folded))
  AND priority = :priority)
  AND due_date || SUBSTR('T00:00:00.000Z', LENGTH(due_date) - 9) < :due_before)
  AND due_date || SUBSTR('T00:00:00.000Z', LENGTH(due_date) - 9) > :due_after)
  AND REPLACE(tags, :tag_0, '') <> tags)
  AND REPLACE(tags, :tag_1, '') <> tags)
  AND id > :last)
  ORDER BY id
  LIMIT :limit;

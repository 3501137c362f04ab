"""The same task API, written the way the documentation of FastAPI and SQLModel teaches it.

A dependency makes a session for each request, another checks the token, and models define the
bodies of requests and answers. As in the documentation, the endpoints are plain functions, because
SQLModel's sessions block, and the check of the token is a coroutine, because it does not.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated

import jwt
from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import Engine, event
from sqlmodel import Field, Session, SQLModel, create_engine, select

SECRET = os.environ["BETTER_AUTH_SECRET"]
WAIT = 30  # seconds for SQLite's write lock: the default, 5, makes errors of many writers at once
# One for each request at once: with the default, 15, a request that holds a connection waits for a
# thread, while the threads wait for a connection.
DATABASE_CONNECTIONS = 64


def now() -> datetime:
    return datetime.now(UTC)


class TaskBase(SQLModel):
    title: str = Field(min_length=1, max_length=200)
    description: str | None = Field(default=None, max_length=10_000)
    completed: bool = False


class Task(TaskBase, table=True):
    id: int | None = Field(default=None, primary_key=True)
    user_id: str = Field(index=True)
    created_at: datetime = Field(default_factory=now)
    updated_at: datetime = Field(default_factory=now)


class TaskCreate(TaskBase):
    pass


class TaskPublic(TaskBase):
    id: int
    user_id: str
    created_at: datetime
    updated_at: datetime


def make_engine() -> Engine:
    waiting = {"check_same_thread": False, "timeout": WAIT}
    engine = create_engine(
        os.environ["DATABASE_URL"], connect_args=waiting, pool_size=DATABASE_CONNECTIONS
    )

    @event.listens_for(engine, "connect")
    def use_wal(connection, record):
        connection.execute("PRAGMA journal_mode=WAL")

    return engine


engine = make_engine()


def get_session() -> Iterator[Session]:
    with Session(engine) as session:
        yield session


async def get_user(
    user_id: str, credentials: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]
) -> str:
    try:
        claims = jwt.decode(
            credentials.credentials, SECRET, ["HS256"], options={"require": ["sub", "exp"]}
        )
    except jwt.InvalidTokenError:
        raise HTTPException(401, "invalid token", {"WWW-Authenticate": "Bearer"}) from None
    if claims["sub"] != user_id:
        raise HTTPException(403, "this token is for another user")
    return user_id


SessionDep = Annotated[Session, Depends(get_session)]
UserDep = Annotated[str, Depends(get_user)]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    SQLModel.metadata.create_all(engine)
    yield


app = FastAPI(lifespan=lifespan)


def find(session: Session, user: str, task_id: int) -> Task:
    task = session.get(Task, task_id)
    if task is None or task.user_id != user:
        raise HTTPException(404, "you have no task with this id")
    return task


@app.get("/api/{user_id}/tasks", response_model=list[TaskPublic])
def list_tasks(user: UserDep, session: SessionDep):
    return session.exec(select(Task).where(Task.user_id == user).order_by(Task.id)).all()


@app.post("/api/{user_id}/tasks", response_model=TaskPublic, status_code=201)
def create_task(new: TaskCreate, user: UserDep, session: SessionDep):
    task = Task.model_validate(new, update={"user_id": user})
    session.add(task)
    session.commit()
    session.refresh(task)
    return task


@app.get("/api/{user_id}/tasks/{task_id}", response_model=TaskPublic)
def get_task(task_id: int, user: UserDep, session: SessionDep):
    return find(session, user, task_id)


@app.patch("/api/{user_id}/tasks/{task_id}/complete", response_model=TaskPublic)
def toggle_task(task_id: int, user: UserDep, session: SessionDep):
    task = find(session, user, task_id)
    task.completed = not task.completed
    task.updated_at = now()
    session.add(task)
    session.commit()
    session.refresh(task)
    return task

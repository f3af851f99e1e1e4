"""Real PostgreSQL and MariaDB servers, of Debian's packages, one of each for all tests.

A test module says ``pytest_plugins = ["helpers.databases"]``, and imports from here for types
only: what is imported before it is a plugin is not rewritten. A missing server skips the tests at
a desk, and fails them in CI.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import sqlalchemy as sa

from flask_usage_metrics.storage.sql import SQLStorage

from . import process

_serial = itertools.count(1)


class Server:
    """A database server in a folder of its own, on a free loopback port.

    Attributes:
        url: Of an empty database, with its user and password.
        pid: Of the process.
    """

    kind: str
    user: str
    url: str
    pid: int | None = None

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"{self.kind}-"))
        self.port = process.free_port()
        # Neither server runs as root.
        self.is_root = os.getuid() == 0
        if self.is_root:
            shutil.chown(self.folder, self.user)
        try:
            self.set_up()
        except BaseException:
            self.close()
            raise

    def set_up(self) -> None:
        """Make the files of the server, start it, and make a database."""
        raise NotImplementedError

    def start(self) -> None:
        raise NotImplementedError

    def stop(self, *, immediately: bool = False) -> None:
        raise NotImplementedError

    def close(self) -> None:
        try:
            if self.pid is not None:
                self.stop()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def engine(self, **arguments: object) -> Iterator[sa.Engine]:
        engine = sa.create_engine(self.url, **arguments)
        yield engine
        engine.dispose()

    @contextmanager
    def storage(self, table_name: str | None = None) -> Iterator[SQLStorage]:
        """Make a storage with a table of its own, which is dropped in the end."""
        storage = SQLStorage.from_url(self.url, table_name=table_name or f"usage_{next(_serial)}")
        storage.is_of_app = True
        try:
            yield storage
        finally:
            storage.close()
            self.drop(storage)

    @contextmanager
    def emptied(self) -> Iterator[str]:
        """Lend the URL; whatever is made in the database is dropped in the end."""
        try:
            yield self.url
        finally:
            with self.engine() as engine, engine.begin() as connection:
                inspector = sa.inspect(connection)
                quote = connection.dialect.identifier_preparer.quote
                for name in inspector.get_view_names():
                    connection.exec_driver_sql(f"DROP VIEW {quote(name)}")
                for name in inspector.get_table_names():
                    connection.execute(sa.schema.DropTable(sa.Table(name, sa.MetaData())))

    def drop(self, storage: SQLStorage) -> None:
        with self.engine() as engine, engine.begin() as connection:
            for component in storage.components():
                for table in component.tables:
                    connection.execute(sa.schema.DropTable(table, if_exists=True))
            noted = sa.Table(f"{storage._table.name}_schema", sa.MetaData())
            connection.execute(sa.schema.DropTable(noted, if_exists=True))

    def run(self, *command: str | Path) -> None:
        """Run a program of the server, as its user."""
        as_user = ["runuser", "-u", self.user, "--"] if self.is_root else []
        done = process.run(*as_user, *command, folder=self.folder, seconds=120)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{self.log()}"

    def log(self) -> str:
        with suppress(OSError):
            return (self.folder / "log").read_text(errors="replace")[-4000:]
        return ""

    def signal(self, number: signal.Signals) -> None:
        """Send the process a signal, and wait for its end."""
        assert self.pid is not None
        os.kill(self.pid, number)
        deadline = time.monotonic() + 60
        while self.is_alive():
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                deadline += 60
            time.sleep(0.02)

    def is_alive(self) -> bool:
        assert self.pid is not None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True


class PostgreSQL(Server):
    """PostgreSQL, whose databases sort texts as dictionaries do."""

    kind = "postgresql"
    user = "postgres"

    def __init__(self) -> None:
        places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: path.parts[-2])
        found = shutil.which("initdb")
        self.programs = Path(found).parent if found else (places or [Path("/nowhere")])[-1]
        process.need((self.programs / "initdb").exists(), "postgresql")
        super().__init__()

    def set_up(self) -> None:
        self.data = self.folder / "data"
        self.run(
            *[self.programs / "initdb", "-D", self.data, "-U", "postgres", "-A", "trust"],
            *["-E", "UTF8", "--locale=C.UTF-8", "-N"],
        )
        self.start()
        place = f"postgresql+psycopg://postgres@127.0.0.1:{self.port}"
        self.url = f"{place}/postgres"
        with self.engine(isolation_level="AUTOCOMMIT") as engine, engine.connect() as connection:
            connection.exec_driver_sql(
                "CREATE DATABASE usage_test TEMPLATE template0 "
                "LOCALE_PROVIDER icu ICU_LOCALE 'und' LOCALE 'C.UTF-8'"
            )
        self.url = f"{place}/usage_test"

    def start(self) -> None:
        options = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": self.folder,
            "fsync": "off",
            "full_page_writes": "off",
        }
        self.run(
            *[self.programs / "pg_ctl", "-D", self.data, "-w", "-t", "60"],
            *["-l", self.folder / "log", "start", "-o"],
            " ".join(f"-c {name}={value}" for name, value in options.items()),
        )
        self.pid = int((self.data / "postmaster.pid").read_text().splitlines()[0])

    def stop(self, *, immediately: bool = False) -> None:
        # As `pg_ctl stop -m immediate` and `-m fast` do.
        self.signal(signal.SIGQUIT if immediately else signal.SIGINT)


class MariaDB(Server):
    """MariaDB, whose databases do not tell upper from lower case unless they are told to."""

    kind = "mariadb"
    user = "mysql"
    options: tuple[str, ...] = ()

    def __init__(self) -> None:
        found = shutil.which("mariadbd") or "/usr/sbin/mariadbd"
        is_there = Path(found).exists() and shutil.which("mariadb-install-db")
        process.need(is_there, "mariadb")
        self.program = found
        super().__init__()

    def set_up(self) -> None:
        self.run(
            *["mariadb-install-db", "--no-defaults", f"--datadir={self.folder / 'data'}"],
            *["--auth-root-authentication-method=normal", "--skip-test-db"],
        )
        self.start()
        for statement in (
            "CREATE DATABASE usage_test",
            "CREATE USER keeper@'127.0.0.1' IDENTIFIED BY 's3cret'",
            "GRANT ALL ON usage_test.* TO keeper@'127.0.0.1'",
        ):
            self.run("mariadb", *self._client, "-e", statement)
        place = f"mysql+pymysql://keeper:s3cret@127.0.0.1:{self.port}"
        self.url = f"{place}/usage_test?charset=utf8mb4"

    @property
    def _client(self) -> list[str]:
        return ["--no-defaults", f"--socket={self.folder / 'socket'}", "-u", "root"]

    def start(self) -> None:
        with (self.folder / "log").open("a") as log:
            self.process = process.Process(
                self.program,
                "--no-defaults",
                *([f"--user={self.user}"] if self.is_root else []),
                f"--datadir={self.folder / 'data'}",
                "--bind-address=127.0.0.1",
                f"--port={self.port}",
                f"--socket={self.folder / 'socket'}",
                # A server that starts deletes what it takes for its own of an earlier run:
                # in a folder they share, the temporary tables of others.
                f"--tmpdir={self.folder}",
                f"--pid-file={self.folder / 'pid'}",
                "--skip-name-resolve",
                "--character-set-server=utf8mb4",
                "--innodb-flush-log-at-trx-commit=2",
                "--innodb-fast-shutdown=2",
                *self.options,
                folder=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.pid = self.process.pid
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            if process.run("mariadb-admin", *self._client, "ping").returncode == 0:
                return
            time.sleep(0.05)
        raise AssertionError(self.log())

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def stop(self, *, immediately: bool = False) -> None:
        self.signal(signal.SIGKILL if immediately else signal.SIGTERM)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """A PostgreSQL server for all tests."""
    server = PostgreSQL()
    yield server
    server.close()


@pytest.fixture(scope="session")
def mariadb() -> Iterator[MariaDB]:
    """A MariaDB server for all tests."""
    server = MariaDB()
    yield server
    server.close()


@pytest.fixture(params=["postgresql", "mariadb"])
def server(request: pytest.FixtureRequest) -> Server:
    """Each of the servers."""
    found: Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database of each kind; what a test makes in it is dropped."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/usage.sqlite3"
        return
    server: Server = request.getfixturevalue(request.param)
    with server.emptied() as url:
        yield url

"""Commits a row at a time, has it acknowledged outside before the next, and
checks afterwards that every committed row is there.

    rows.py sqlite|postgres write PLACE NAME PORT FIRST     until it is killed
    rows.py sqlite|postgres check PLACE LAST

PLACE is SQLite's file, or the folder of PostgreSQL's socket. Each transaction
adds a row with two indexes and moves a counter; both must agree afterwards.
"""

import glob
import hashlib
import sqlite3
import subprocess
import sys

from promises import Promises

SCHEMA = """
CREATE TABLE IF NOT EXISTS numbered (number INTEGER PRIMARY KEY, content TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS counter (one INTEGER PRIMARY KEY, highest INTEGER NOT NULL);
"""


def content(number):
    return hashlib.sha256(str(number).encode()).hexdigest() * (1 + number % 24)


def transaction(number):
    return (
        f"INSERT INTO numbered VALUES ({number}, '{content(number)}')"
        f" ON CONFLICT (number) DO NOTHING; "
        f"INSERT INTO counter VALUES (1, {number})"
        f" ON CONFLICT (one) DO UPDATE SET highest = {number};"
    )


class Sqlite:
    def __init__(self, file):
        self.database = sqlite3.connect(file, isolation_level=None)
        mode = self.database.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        self.database.execute("PRAGMA synchronous = FULL")
        if mode != "wal":
            sys.exit(f"the journal is {mode}")
        self.database.executescript(SCHEMA)

    def commit(self, number):
        self.database.execute("BEGIN")
        for statement in transaction(number).split("; "):
            self.database.execute(statement)
        self.database.execute("COMMIT")

    def rows(self, query):
        return self.database.execute(query).fetchall()

    def integrity(self):
        said = self.rows("PRAGMA integrity_check")
        if said != [("ok",)]:
            sys.exit(f"integrity_check: {said}")


class Postgres:
    """One psql that lives as long as the writer does."""

    def __init__(self, folder):
        self.access = ["-h", folder, "-U", "postgres"]
        self.psql = subprocess.Popen(
            ["psql", *self.access, "-qAtX", "-F", " ", "-v", "ON_ERROR_STOP=1", "postgres"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ask(f"SET client_min_messages = warning; {SCHEMA}")

    def ask(self, text):
        print(text, "\n\\echo done", file=self.psql.stdin, flush=True)
        lines = []
        for line in self.psql.stdout:
            if line == "done\n":
                return lines
            lines.append(tuple(int(word) if word.isdigit() else word for word in line.split()))
        sys.exit("psql ended")

    def commit(self, number):
        self.ask(f"BEGIN; {transaction(number)} COMMIT;")

    def rows(self, query):
        return self.ask(query + ";")

    def integrity(self):
        amcheck = sorted(glob.glob("/usr/lib/postgresql/*/bin/pg_amcheck"))[-1]
        check = [amcheck, *self.access, "--install-missing", "--heapallindexed", "postgres"]
        subprocess.run(check, check=True)
        # Reads every page, and so its checksum.
        subprocess.run(["pg_dump", *self.access, "-f", "/dev/null", "postgres"], check=True)


def write(database, name, port, first):
    promises = Promises(name, port)
    number = int(first)
    while True:
        database.commit(number)
        promises.tell(number)
        number += 1


def check(database, last):
    last = int(last)
    rows = dict(database.rows("SELECT number, content FROM numbered"))
    # Compared as text: a hash may be made of digits alone.
    lost = [number for number in range(last + 1) if str(rows.get(number)) != content(number)]
    if lost:
        sys.exit(f"{len(lost)} of {last + 1} committed rows are lost, the first is {lost[0]}")
    highest = database.rows("SELECT highest FROM counter")[0][0]
    if highest < last or sorted(rows) != list(range(highest + 1)):
        sys.exit(f"the counter has {highest}, the table {len(rows)} rows, {last + 1} were committed")
    database.integrity()
    print(f"{last + 1} committed rows compared")


kind, verb, place, *rest = sys.argv[1:]
database = {"sqlite": Sqlite, "postgres": Postgres}[kind](place)
{"write": write, "check": check}[verb](database, *rest)

"""What a disk may hold after a loss of power: recorded operations replayed, with what was not synced dropped.

A model of a hostile file system. What a file holds is on the disk once it is synced; its name, once its folder is.
Before that any part of it may be: writes in any subset, the last of them torn; names made, changed and removed in any
subset too, each of these whole. This is more than any journal allows, as in the tests of SQLite and LevelDB.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from traced import Work, strace

Node = int
"""A file or a folder, whatever its name."""


@dataclass(frozen=True)
class Operation:
    """One change of the disk, or a sync of a node."""

    kind: str
    """link, write, truncate, sync."""
    node: Node
    folder: Node = -1
    """Whose entry changes."""
    removes: str = ""
    adds: str = ""
    into: Node = -1
    """The folder of the new name, where one is moved."""
    at: int = 0
    content: bytes = b""


@dataclass(frozen=True)
class State:
    """Files by their path below the folder, folders as None."""

    entries: frozenset[tuple[str, bytes | None]]

    def lay_out(self, folder: Path) -> None:
        """Write it down."""
        folder.mkdir(parents=True)
        for path, content in sorted(self.entries, key=lambda entry: entry[0]):
            if content is None:
                (folder / path).mkdir(parents=True)
            else:
                (folder / path).write_bytes(content)


@dataclass
class Disk:
    """A folder as it lies, all of it synced, and what operations make of it."""

    root: Path
    names: dict[tuple[Node, str], Node] = field(default_factory=dict)
    contents: dict[Node, bytes | None] = field(default_factory=dict)
    """None of a folder."""

    def __post_init__(self) -> None:
        self.contents[0] = None
        nodes = {self.root: 0}
        for path in sorted(self.root.rglob("*")):
            node = nodes[path] = len(nodes)
            self.names[nodes[path.parent], path.name] = node
            self.contents[node] = None if path.is_dir() else path.read_bytes()

    def states(self, operations: Sequence[Operation], drawn: int) -> Iterator[State]:
        """Yield what may be there after these: nothing unsynced, all of it, names without contents, and draws."""
        pending = [i for i, done in enumerate(operations) if done.kind != "sync" and not _synced(operations, i)]
        names = {i for i in pending if operations[i].kind == "link"}
        for dropped in (set(pending), set(), set(pending) - names, names):
            yield self._after(operations, dropped)
        for _ in range(drawn if pending else 0):
            yield self._after(operations, {i for i in pending if random.random() < 0.5}, torn=True)

    def _after(self, operations: Sequence[Operation], dropped: set[int], *, torn: bool = False) -> State:
        names, contents = dict(self.names), dict(self.contents)
        for i, done in enumerate(operations):
            if done.kind == "link":
                contents.setdefault(done.node, None if done.content == b"folder" else b"")
                if i in dropped:
                    continue
                if done.removes and names.get((done.folder, done.removes)) == done.node:
                    del names[done.folder, done.removes]
                if done.adds:
                    names[done.into, done.adds] = done.node
            elif done.kind in ("write", "truncate") and i not in dropped:
                held = contents[done.node] or b""
                if done.kind == "truncate":
                    contents[done.node] = held[: done.at].ljust(done.at, b"\0")
                    continue
                written = done.content
                if torn and not _synced(operations, i) and random.random() < 0.5:
                    written = written[: random.randrange(len(written) + 1)]
                contents[done.node] = held[: done.at].ljust(done.at, b"\0") + written + held[done.at + len(written) :]
        return State(frozenset(_below(0, "", names, contents)))


def _below(
    node: Node, path: str, names: dict[tuple[Node, str], Node], contents: dict[Node, bytes | None]
) -> Iterator[tuple[str, bytes | None]]:
    for (folder, name), inside in names.items():
        if folder == node:
            yield f"{path}{name}", contents[inside]
            yield from _below(inside, f"{path}{name}/", names, contents)


def _synced(operations: Sequence[Operation], i: int) -> bool:
    """Whether a later sync has made this one last."""
    of = operations[i].folder if operations[i].kind == "link" else operations[i].node
    return any(later.kind == "sync" and later.node == of for later in operations[i + 1 :])


CALL = re.compile(r"(\w+)\((.*)\)\s+= (-?\d+)")
TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
OF_DESCRIPTORS = ("write", "ftruncate", "fsync", "fdatasync", "close", "pwrite64", "mmap")
CALLS = "openat,mkdir,write,ftruncate,fsync,rename,renameat,unlink,unlinkat,rmdir,close,pwrite64,mmap,fdatasync"


def recorded(work: Work, root: Path, folder: Path) -> list[Operation]:
    """Do work in a child, and return what it did to what lies in `root`, by the system calls that it made."""
    nodes = {root: 0} | {path: i for i, path in enumerate(sorted(root.rglob("*")), 1)}
    ended = strace(work, ["-xx", "-s", str(2**24), "-e", f"trace={CALLS}"], folder)
    made: list[Operation] = []
    opened: dict[int, tuple[Node, int]] = {}
    fresh = len(nodes)
    for line in ended.calls:
        called = CALL.match(line)
        if called is None or int(called[3]) < 0:
            continue
        name, given, result = called[1], called[2], int(called[3])
        paths = [Path(bytes.fromhex(text.replace("\\x", "")).decode()) for text in _paths(name, given)]
        if name == "unlinkat" and not paths[0].is_absolute():
            paths = [_place_of(opened, given, nodes) / paths[0]] if int(given.split(",")[0]) in opened else []
        if name not in OF_DESCRIPTORS and not any(path.is_relative_to(root) for path in paths):
            continue
        first = given.split(",")[0]
        match name:
            case "openat":
                (path,) = paths
                if path not in nodes:
                    assert "O_CREAT" in given, line
                    nodes[path], fresh = fresh, fresh + 1
                    made.append(_link(nodes, nodes[path], adds=path))
                if "O_TRUNC" in given:
                    made.append(Operation("truncate", nodes[path]))
                opened[result] = (nodes[path], 0)
            case "mkdir":
                (path,) = paths
                nodes[path], fresh = fresh, fresh + 1
                made.append(_link(nodes, nodes[path], adds=path, content=b"folder"))
            case "write" if int(first) in opened:
                node, at = opened[int(first)]
                text = TEXT.search(given)
                assert text is not None
                content = bytes.fromhex(text[1].replace("\\x", ""))[:result]
                made.append(Operation("write", node, at=at, content=content))
                opened[int(first)] = (node, at + result)
            case "ftruncate" if int(first) in opened:
                made.append(Operation("truncate", opened[int(first)][0], at=int(given.split(",")[1])))
            case "fsync" | "fdatasync" if int(first) in opened:
                made.append(Operation("sync", opened[int(first)][0]))
            case "rename" | "renameat":
                old, new = paths
                made.append(_link(nodes, nodes[old], removes=old, adds=new))
                for path in [path for path in nodes if path == old or path.is_relative_to(old)]:
                    nodes[new / path.relative_to(old)] = nodes.pop(path)
            case "unlink" | "unlinkat" | "rmdir":
                (gone,) = paths
                made.append(_link(nodes, nodes[gone], removes=gone))
                del nodes[gone]
            case "close":
                opened.pop(int(first), None)
            case "pwrite64" | "mmap":
                assert int(first) not in opened if name == "pwrite64" else "MAP_SHARED" not in given, line
    return made


def _paths(name: str, given: str) -> list[str]:
    return TEXT.findall(given) if name not in ("write", "pwrite64") else []


def _place_of(opened: dict[int, tuple[Node, int]], given: str, nodes: dict[Path, Node]) -> Path:
    """Return the folder that is open under a call's first number."""
    node, _ = opened[int(given.split(",")[0])]
    return next(path for path, known in nodes.items() if known == node)


def _link(
    nodes: dict[Path, Node], node: Node, *, removes: Path | None = None, adds: Path | None = None, content: bytes = b""
) -> Operation:
    of: Any = removes or adds
    return Operation(
        "link",
        node,
        folder=nodes[of.parent],
        removes=removes.name if removes else "",
        adds=adds.name if adds else "",
        into=nodes[adds.parent] if adds else -1,
        content=content,
    )

"""A power cut: what was not synced is lost, in whole or in part."""

import json
import os
import random
import shutil
import stat
from pathlib import Path


class Recorder:
    """Notes what is synced below a folder, from now on; what is there already counts as synced."""

    def __init__(self, root: Path, store: Path):
        self.root, self.store, self.number = root, store, 0
        self.kept_open = []  # so that no inode's number is given to another file
        self.journal = (store / "journal.jsonl").open("w")
        for path in (root, *root.rglob("*")):
            number = os.open(path, os.O_RDONLY)
            self.note(number)
            os.close(number)

    def begin(self) -> None:
        """Listens to `os.fsync`."""
        fsync = os.fsync

        def noted(number: int) -> None:
            fsync(number)
            self.note(number)

        os.fsync = noted

    def note(self, number: int) -> None:
        self.kept_open.append(os.dup(number))
        status = os.fstat(number)
        if stat.S_ISDIR(status.st_mode):
            with os.scandir(number) as entries:
                names = {entry.name: entry.inode() for entry in entries}
            row = {"folder": status.st_ino, "names": names}
        else:
            self.number += 1
            content = Path(f"/proc/self/fd/{number}").read_bytes()
            (self.store / str(self.number)).write_bytes(content)
            row = {"file": status.st_ino, "content": self.number}
        self.journal.write(json.dumps(row) + "\n")
        self.journal.flush()


def rebuild(root: Path, store: Path, chance: random.Random | None = None) -> None:
    """Puts a tree that a power cut could have left in the place of `root`."""
    folders, files = {}, {}
    for line in (store / "journal.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "folder" in row:
            folders[row["folder"]] = row["names"]
        else:
            files[row["file"]] = store / str(row["content"])
    now = {path.stat().st_ino: path for path in (root, *root.rglob("*"))}
    new = root.with_name(root.name + "-after")

    def either(synced, later):
        return synced if chance is None or chance.random() < 0.5 else later

    def make_folder(inode: int, place: Path) -> None:
        place.mkdir()
        later = ({path.name: path.stat().st_ino for path in now[inode].iterdir()}
                 if inode in now else {})
        synced = folders.get(inode, {})
        for name in sorted({*synced, *later}):
            chosen = either(synced.get(name), later.get(name))
            if chosen is None:
                continue
            is_folder = chosen in folders or chosen in now and now[chosen].is_dir()
            (make_folder if is_folder else make_file)(chosen, place / name)

    def make_file(inode: int, place: Path) -> None:
        synced = files[inode].read_bytes() if inode in files else b""
        later = now[inode].read_bytes() if inode in now else synced
        if chance is not None and later.startswith(synced):
            cut = chance.randint(len(synced), len(later))
            later = chance.choice((later, later[:cut], later[:cut] + bytes(len(later) - cut)))
        place.write_bytes(either(synced, later))

    make_folder(root.stat().st_ino, new)
    shutil.rmtree(root)
    new.rename(root)

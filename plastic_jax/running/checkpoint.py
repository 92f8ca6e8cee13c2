"""Checkpoints of a run, by Orbax: everything computed so far in one tree of arrays, written beside the training."""

import concurrent.futures
import json
import logging
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from plastic_jax.errors import InputError
from plastic_jax.files import replace_file

Tree = Any
KEPT = 2  # the newest may turn out damaged


def _crc(tree: Tree, host: bytes) -> int:
    """CRC-32 over the host's part and all arrays, in the order of their paths."""
    total = zlib.crc32(host)
    for name in sorted(tree):
        value = tree[name]
        inner = _crc(value, b"") if isinstance(value, dict) else zlib.crc32(np.ascontiguousarray(value).data)
        total = zlib.crc32(f"{name}{inner}".encode(), total)
    return total


def _files_crc(folder: Path) -> int:
    """CRC-32 over the names and contents of all files below a folder."""
    total = 0
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        total = zlib.crc32(file.read_bytes(), zlib.crc32(str(file.relative_to(folder)).encode(), total))
    return total


class Checkpoints:
    """The checkpoints under `directory`: nested dicts of host arrays and one JSON value beside them.

    A save runs in the background; the next one waits for it. `restore` never sees an unfinished one. As soon as one is
    finished its checksum is written to DIRECTORY.json, so that a damaged one is passed over before Orbax, whose threads
    then go on complaining, gets to see it; one whose process was killed in that moment has only the checksum inside.
    """

    def __init__(self, directory: Path):
        from orbax.checkpoint import v1 as ocp

        logging.getLogger("absl").setLevel(logging.ERROR)
        self.directory = directory
        self._manager = ocp.training.Checkpointer(
            directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(KEPT),
            cleanup_tmp_directories=True,
        )
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._beside = directory.with_name(directory.name + ".json")
        self._step = max((c.step for c in self._manager.checkpoints), default=-1) + 1

    def save(self, arrays: Tree, host: Any, wait: bool = False) -> None:
        """Write `arrays` (not touched afterwards by the caller) and `host`; `wait` returns when it is on the disk."""
        self.wait()
        text = json.dumps(host).encode()
        tree = {"arrays": arrays, "host": np.frombuffer(text, np.uint8)}
        tree["crc"] = np.asarray([_crc(arrays, text)], np.uint32)
        saving = self._manager.save_async(self._step, tree, force=True)
        self._pending = self._background.submit(self._finish, saving, self._step)
        self._step += 1
        if wait:
            self.wait()

    def wait(self) -> None:
        """Return when the save under way, if any, is on the disk; raises what it raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _finish(self, saving: Any, step: int) -> None:
        saving.result()
        held = {k: v for k, v in self._checksums().items() if (self.directory / k).exists()}
        held[str(step)] = _files_crc(self.directory / str(step))
        replace_file(self._beside, json.dumps(held).encode())

    def restore(self, say: Callable[[str], None]) -> tuple[Tree, Any] | None:
        """The newest checkpoint that loads whole, or None where there is none.

        Raises:
          InputError: there are checkpoints, and all of them are damaged.
        """
        steps = sorted((c.step for c in self._manager.checkpoints), reverse=True)
        checksums = self._checksums()
        for step in steps:
            try:
                crc = _files_crc(self.directory / str(step))
                if checksums.get(str(step), crc) != crc:
                    raise ValueError("checksum")
                tree = self._manager.load(step)
                text = np.asarray(tree["host"]).tobytes()
                arrays = tree.get("arrays", {})
                if int(np.asarray(tree["crc"])[0]) != _crc(arrays, text):
                    raise ValueError("checksum")
                return arrays, json.loads(text)
            except Exception as error:  # whatever a damaged file makes Orbax raise
                say(
                    f"checkpoint {self.directory / str(step)} is damaged ({type(error).__name__}); trying an older one."
                )
        if steps:
            raise InputError(
                f"--workdir: all checkpoints in {self.directory} are damaged: restore one of them, or name another "
                "folder to train from the start; plastic_jax.load reads the table so far."
            )
        return None

    def _checksums(self) -> dict[str, int]:
        try:
            return dict(json.loads(self._beside.read_text()))
        except (OSError, ValueError):
            return {}

    def close(self) -> None:
        """Finish the current save and release the directory."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._manager.close()

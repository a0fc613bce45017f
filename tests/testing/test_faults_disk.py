"""Disks that take no more."""

from __future__ import annotations

import errno
import subprocess
from pathlib import Path

import pytest

from tests.testing.child import child
from torchft.testing.faults import fill_disk, limit_file_size

PRIVATE = ["unshare", "--user", "--map-root-user", "--mount"]
"""Before a command: it may mount what nobody else sees, and what is gone with it."""


def _can_mount(folder: Path) -> bool:
    try:
        return (
            subprocess.run([*PRIVATE, "mount", "-t", "tmpfs", "none", str(folder)], capture_output=True, timeout=60)
        ).returncode == 0
    except OSError:
        return False


def _mounting(folder: Path) -> str:
    return f"""
    import errno, subprocess
    disk = {str(folder)!r}
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], check=True)
    def write(size):
        try:
            with open(disk + "/file", "wb", buffering=0) as f:
                done = 0
                while done < size:
                    done += f.write(bytes(min(65536, size - done)))
            return 0
        except OSError as e:
            return e.errno
        finally:
            os.path.exists(disk + "/file") and os.unlink(disk + "/file")
    """


def test_a_full_disk_fails_writes_until_released(tmp_path: Path) -> None:
    if not _can_mount(tmp_path):
        pytest.skip("this machine lets nobody mount a tmpfs of their own")
    code = f"""{_mounting(tmp_path)}
    say(before=write(1 << 20))
    with faults.fill_disk(disk) as effect:
        say(full=write(1), files=os.listdir(disk))
    say(after=write(1 << 20))
    with faults.fill_disk(disk, leave=1 << 20):
        say(fits=write(1 << 19), not_fits=write(2 << 20), left=os.statvfs(disk).f_bfree * os.statvfs(disk).f_frsize)
    try:
        faults.fill_disk(disk, limit=1 << 20)
    except ValueError as e:
        say(refused=str(e), still=write(3 << 20))
    if os.fork() == 0:  # with a filler of its own, and then it is killed
        faults.fill_disk(disk)
        faults.kill()
    os.wait()
    say(after_death=write(1 << 20))
    """
    with child(tmp_path.parent, code, PRIVATE) as c:
        assert c.event() == {"before": 0}
        assert c.event() == {"full": errno.ENOSPC, "files": []}
        assert c.event() == {"after": 0}
        assert c.event() == {"fits": 0, "not_fits": errno.ENOSPC, "left": 1 << 20}
        refused = c.event()
        assert "more than the limit of 1048576 bytes" in refused["refused"]
        assert refused["still"] == 0
        assert c.event() == {"after_death": 0}
        assert c.wait() == 0


def test_a_disk_with_too_much_space_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="limit of 0 bytes"):
        fill_disk(tmp_path, limit=0)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="left free"):
        fill_disk(tmp_path, leave=-1)


def test_limited_files_fail_writes_until_released(tmp_path: Path) -> None:
    code = f"""
    path = {str(tmp_path / "file")!r}
    def write():
        try:
            with open(path, "wb", buffering=0) as f:
                while f.tell() < 4 << 20:
                    f.write(bytes(65536))
            return 0
        except OSError as e:
            return e.errno
    with faults.limit_file_size(1 << 20):
        say(limited=write(), size=os.path.getsize(path))
    say(released=write())
    """
    with child(tmp_path, code) as c:
        assert c.event() == {"limited": errno.EFBIG, "size": 1 << 20}
        assert c.event() == {"released": 0}
        assert c.wait() == 0


def test_a_limit_that_cannot_be_set_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        limit_file_size(-1)

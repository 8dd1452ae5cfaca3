"""The number of threads that a control group leaves, as Linux shows it in files."""

import pytest
from gatewise.settings import _quota

VERSION_2 = "0::/a/b\n"
VERSION_1 = "12:cpuset:/\n4:cpu,cpuacct:/docker/a\n1:name=systemd:/docker/a\n0::/system.slice\n"


def tree(root, group, files):
    for name, text in {"proc/self/cgroup": group, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def of_version_1(folder, quota, period=100_000):
    name = f"sys/fs/cgroup/cpu{folder}"
    return {f"{name}/cpu.cfs_quota_us": f"{quota}\n", f"{name}/cpu.cfs_period_us": f"{period}\n"}


@pytest.mark.parametrize(
    ("group", "files", "processors"),
    [
        (VERSION_2, {"sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, None),
        (VERSION_2, {"sys/fs/cgroup/a/b/cpu.max": "300000 100000\n"}, 3),
        (VERSION_2, {"sys/fs/cgroup/a/b/cpu.max": "300000 100000\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 2),
        (VERSION_2, {"sys/fs/cgroup/a/b/cpu.max": "20000 100000\n"}, 1),
        (VERSION_2, {"sys/fs/cgroup/a/b/cpu.max": "a few\n"}, None),
        (VERSION_1, of_version_1("/docker/a", 250_000, 50_000), 5),
        (VERSION_1, of_version_1("/docker/a", -1), None),
        # In a container the folder of its own group is the topmost.
        (VERSION_1, of_version_1("", 400_000), 4),
        (VERSION_1, {**of_version_1("", 400_000), **of_version_1("/docker", 200_000)}, 2),
        (VERSION_1, of_version_1("/elsewhere", 100_000), None),
        (VERSION_1, of_version_1("", 400_000, 0), None),
        ("", {}, None),
        ("nonsense\n", {}, None),
    ],
)
def test_quota(tmp_path, group, files, processors):
    tree(tmp_path, group, files)
    assert _quota(tmp_path) == processors


def test_no_control_groups(tmp_path):
    assert _quota(tmp_path) is None

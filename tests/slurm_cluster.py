"""A real Slurm on this machine for tests: one controller, several virtual nodes, loopback only.

Everything lies in a folder of the test's; nothing in /etc is read or written. The nodes are
`n1`, `n2`, ...: slurmd processes that believe to have more cores than there are. Slurm's own
limits for answers are far above its defaults, because the machine may be busy.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["SlurmCluster", "running_slurm", "why_no_slurm"]

_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool_%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd_%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
KillWait=10
MinJobAge=3600
MessageTimeout=60
BatchStartTimeout=300
SlurmdTimeout=900
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=300
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""


def why_no_slurm() -> str | None:
    """Return why no cluster can be started here, or None if one can."""
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not found; apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "only root can start slurmd"


class SlurmCluster:
    """The programs of a running cluster, called with its configuration."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {"SLURM_CONF": str(root / "slurm.conf")}

    def call(self, *command: str) -> str:
        """Run a program of Slurm and return what it prints."""
        done = subprocess.run(
            command,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> Mapping[str, str]:
        """Return what Slurm says of a job, by field."""
        text = self.call("scontrol", "show", "job", "-o", number)
        return dict(re.findall(r"(\w[\w:/]*)=(\S*)", text))

    def states(self, number: str) -> list[str]:
        """Return the states of a job's tasks, also of those that have ended."""
        text = self.call("scontrol", "show", "job", "-o", number)
        return re.findall(r"JobState=(\S+)", text)

    def wait(self, number: str, *, until: Callable[[list[str]], bool], seconds: float) -> list[str]:
        """Return the states of a job as soon as `until` holds of them."""
        deadline = time.monotonic() + seconds
        while not until(states := self.states(number)):
            assert time.monotonic() < deadline, f"{states}\n{self.logs()}"
            time.sleep(0.3)
        return states

    def bring_back(self, node: str) -> None:
        """Put a node that was set down back to work.

        Slurm may do that by itself at any moment, when the node registers again: what counts is
        the node's state, not what an update that came too late says.
        """
        deadline = time.monotonic() + 120
        while "down" in self.call("sinfo", "-h", "-n", node, "-o", "%T"):
            assert time.monotonic() < deadline, self.logs()
            subprocess.run(
                ("scontrol", "update", f"nodename={node}", "state=resume"),
                env={**os.environ, **self.environment},
                capture_output=True,
                timeout=180,
                check=False,
            )
            time.sleep(0.3)

    def logs(self) -> str:
        """Return the ends of the daemons' logs."""
        files = sorted(self.root.glob("*.log"))
        return "\n".join(f"{file.name}: {file.read_text()[-1500:]}" for file in files)


@contextmanager
def running_slurm(root: Path, *, nodes: int = 2, cores: int = 4) -> Iterator[SlurmCluster]:
    """Start a cluster in an empty folder and end it with everything that runs there."""
    cluster = SlurmCluster(root)
    ports = _free_ports(nodes + 1)
    host = socket.gethostname()
    (root / "state").mkdir(parents=True)
    lines = [
        f"NodeName=n{n} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[n]} CPUs={cores} "
        "RealMemory=4000 State=UNKNOWN"
        for n in range(1, nodes + 1)
    ]
    (root / "slurm.conf").write_text(
        _CONFIGURATION.format(root=root, host=host, port=ports[0], nodes="\n".join(lines))
    )
    try:
        cluster.call("slurmctld", "-c", "-f", str(root / "slurm.conf"))
        for n in range(1, nodes + 1):
            (root / f"spool_n{n}").mkdir()
            cluster.call("slurmd", "-f", str(root / "slurm.conf"), "-N", f"n{n}")
        _await_idle(cluster, nodes)
        yield cluster
    finally:
        _stop(cluster)


def _await_idle(cluster: SlurmCluster, nodes: int) -> None:
    deadline = time.monotonic() + 120
    while cluster.call("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split() != ["idle"] * nodes:
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.1)


def _stop(cluster: SlurmCluster) -> None:
    if (cluster.root / "slurmctld.pid").exists():
        numbers = cluster.call("squeue", "-h", "-o", "%A").split()
        if numbers:
            cluster.call("scancel", "--full", "--signal=KILL", *numbers)
            cluster.call("scancel", *numbers)
        deadline = time.monotonic() + 20
        while cluster.call("squeue", "-h", "-o", "%A") and time.monotonic() < deadline:
            time.sleep(0.2)
    pids = [int(file.read_text()) for file in cluster.root.glob("*.pid") if file.read_text()]
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 5
        for pid in filter(_runs, pids):
            os.kill(pid, number)
        while any(map(_runs, pids)) and time.monotonic() < deadline:
            time.sleep(0.1)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _free_ports(number: int) -> Sequence[int]:
    """Return ports that nobody listens on; held together, so that they differ."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()

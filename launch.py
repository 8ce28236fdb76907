"""Run a script in several processes, one per GPU, with torch's elastic launcher (torchrun).

    python launch.py --gpus 8 train_model.py --full
    python launch.py --gpus 8 --nodes 2 --node-rank 0 --rendezvous host:29500 train_model.py --full

One process without restarts is plain Python. What the first process says appears here; of the
others only what they say when one of them fails.
"""

import argparse
import logging
import os
import shlex
import signal
import socket
import sys
import tempfile
import uuid
from contextlib import contextmanager
from pathlib import Path

import command_line as cli

from config import ConfigError

USER_ERRORS = (ConfigError,)
TAIL = 30  # lines of a failed process that are shown
LOOPBACK = "127.0.0.1"
TORCH_LEVEL = "TORCH_CPP_LOG_LEVEL"  # read when torch is loaded
MEETING_SECONDS = 600  # for machines to start after each other; as processes.MEETING
DAY = 24 * 60 * 60  # in seconds
# For a step, a grid and a checkpoint, which a signal interrupts nowhere; then torch kills.
STOPPING_SECONDS = 300
STOPPING_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


def parse_arguments():
    parser = cli.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gpus", metavar="N", default="all",
                        help="processes on this machine, one per GPU: a number, or all (all)")
    parser.add_argument("--nodes", metavar="N", help="machines (1)")
    parser.add_argument("--node-rank", metavar="N", default="0",
                        help="which of the machines this is; 0 writes the results (0)")
    parser.add_argument("--rendezvous", metavar="HOST:PORT",
                        help="machine 0 and a free port of it; the same on all of them")
    parser.add_argument("--restarts", metavar="N", default="0",
                        help="times to go on from the last checkpoint when a process dies (0)")
    parser.add_argument("script", help="what to run; its own arguments follow")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser.parse_args()


def count_gpus(text: str) -> int:
    if text != "all":
        return cli.parse_whole("--gpus", text)
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        raise ConfigError("--gpus all, but no GPU can be used here: `make gpu-status` says why; a "
                          "number starts so many processes on the CPU")
    return count


def rendezvous_of(args, nodes: int) -> dict:
    """What tells the launchers of several machines, or of this one alone, where to meet."""
    if nodes == 1:
        if args.nodes is None and (args.rendezvous or args.node_rank != "0"):
            raise ConfigError("--rendezvous and --node-rank are for several machines; say how many "
                              "with --nodes (make: NODES=)")
        # Heartbeats are for other machines, and one that is under way when the launcher ends is
        # reported by Python as an error.
        return {"rdzv_backend": "c10d", "rdzv_endpoint": f"{LOOPBACK}:0", "local_addr": LOOPBACK,
                "rdzv_configs": {"is_host": True, "keep_alive_interval": DAY}}
    host, _, port = (args.rendezvous or "").rpartition(":")
    if not host or not port.isdecimal() or int(port) not in range(1, 65536):
        raise ConfigError("several machines need --rendezvous HOST:PORT (make: RENDEZVOUS=), "
                          f"machine 0 and a free port of it, not {args.rendezvous!r}")
    rank = cli.parse_whole("--node-rank", args.node_rank, 0, nodes - 1)
    try:
        socket.getaddrinfo(host, int(port))
    except OSError as error:
        raise ConfigError(f"--rendezvous {args.rendezvous} cannot be looked up here: "
                          f"{error.strerror}") from None
    print(f"machine {rank} of {nodes}: meeting the others at {args.rendezvous}, for up to "
          f"{MEETING_SECONDS // 60} minutes", flush=True)
    # Static, so that machine 0 has rank 0 and thereby the results.
    return {"rdzv_backend": "static", "rdzv_endpoint": args.rendezvous,
            "rdzv_configs": {"rank": rank, "timeout": MEETING_SECONDS}}


def describe_failure(failures: dict, folder: Path, restarts: int, nodes: int) -> str:
    """The process that failed first, and why, in a sentence; what it said is printed before."""
    mistake = folder / cli.MISTAKE
    if mistake.exists():
        return mistake.read_text()
    # Those that lost the others, or were ended after them, are not the cause, unless that is on
    # another machine.
    followed = (cli.LOST_STATUS, -signal.SIGTERM)
    culprits = {r: f for r, f in failures.items() if f.exitcode not in followed} or failures
    rank, failure = min(culprits.items(), key=lambda item: (item[1].timestamp, item[0]))
    said = [line for path in sorted(folder.glob(f"*/attempt_{restarts}/{failure.local_rank}/*.log"))
            for line in path.read_text(errors="replace").splitlines()]
    print(*said[-TAIL:], sep="\n", file=sys.stderr, end="\n" if said else "")
    if failure.exitcode < 0:
        how = f"was killed by {failure.signal_name()}"
    elif failure.exitcode == cli.LOST_STATUS and nodes > 1:
        how = "lost a process of another machine, whose launcher says more"
    else:
        how = f"failed with status {failure.exitcode}, for the reason above"
    again = os.environ[cli.COMMAND]
    return (f"process {rank} (pid {failure.pid}) {how}; the others were ended. To go on from what "
            f"is saved: {again}")


@contextmanager
def loading_quietly():
    """Inside, what torch says from C++ while it is imported is not shown."""
    level = os.environ.get(TORCH_LEVEL)
    os.environ[TORCH_LEVEL] = "FATAL"
    try:
        yield
    finally:  # the processes may say what they want
        del os.environ[TORCH_LEVEL]
        if level is not None:
            os.environ[TORCH_LEVEL] = level


def launch(script: list[str], gpus: int, nodes: int, restarts: int, rendezvous: dict, *,
           leader_here: bool) -> int:
    """Run a Python script in so many processes; returns the status they agree on."""
    with loading_quietly():
        from torch.distributed import DistError
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    stopped_by = ["SIGTERM", "SIGINT", "SIGQUIT"] + ["SIGHUP"] * (not under_nohup)
    silent = {rank: Std.ALL for rank in range(gpus) if rank > 0 or not leader_here}
    with tempfile.TemporaryDirectory(prefix="launch_") as folder:
        os.environ[cli.LAUNCH_FOLDER], folder = folder, Path(folder)
        processes = elastic_launch(LaunchConfig(
            min_nodes=nodes, max_nodes=nodes, nproc_per_node=gpus, run_id=uuid.uuid4().hex
            if nodes == 1 else "training", max_restarts=restarts,
            logs_specs=DefaultLogsSpecs(log_dir=str(folder), redirects=silent), **rendezvous,
            signals_to_handle=",".join(stopped_by),
        ), sys.executable)
        try:
            processes(*script)
        except ChildFailedError as error:
            raise ConfigError(
                describe_failure(error.failures, folder, restarts, nodes)
            ) from None
        except SignalException as error:
            if not (folder / cli.STATUS).exists():  # which they leave when all are through
                cli.complain("the processes ended before they were through; to go on from what is "
                             f"saved: {os.environ[cli.COMMAND]}")
            return 128 + error.sigval
        except DistError as error:
            reason = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")
            raise ConfigError(
                f"no meeting at {rendezvous['rdzv_endpoint']}: {reason}; start the same command on "
                "every machine, with a port that is free and open on machine 0"
            ) from None
        finally:
            del os.environ[cli.LAUNCH_FOLDER]  # it was for them, not for this process
        agreed = folder / cli.STATUS
        return int(agreed.read_text()) if agreed.exists() else 0


def main() -> int:
    args = parse_arguments()
    # What torch's launcher would report of its own troubles is said here, once and shorter.
    logging.disable(logging.CRITICAL)
    with loading_quietly():
        gpus, nodes = count_gpus(args.gpus), cli.parse_whole("--nodes", args.nodes or "1")
    restarts = cli.parse_whole("--restarts", args.restarts, 0, 1000)
    if not Path(args.script).is_file():
        raise ConfigError(f"{args.script} is no script here")
    script, rendezvous = [args.script, *args.arguments], rendezvous_of(args, nodes)
    if gpus == nodes == 1 and not restarts:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *script])
    again = [word for word in sys.argv if word != "--fresh"]
    os.environ[cli.COMMAND] = shlex.join([sys.executable, *again])
    os.environ[cli.LAUNCHER] = str(os.getpid())
    cores = len(os.sched_getaffinity(0))  # that may be used, of those there are
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // gpus)))
    os.environ.setdefault(STOPPING_TIMEOUT, str(STOPPING_SECONDS))
    return launch(script, gpus, nodes, restarts, rendezvous,
                  leader_here=nodes == 1 or int(args.node_rank) == 0)


if __name__ == "__main__":
    cli.exit_with(main, USER_ERRORS)

"""Train the class-conditional diffusion model: full, overfit, quick-test or demo run.

    python train_model.py --full
    python train_model.py --overfit --samples 1

A run that was interrupted continues when the same command is run again, but for a quick-test, which
always starts anew.
"""

import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import command_line as cli

import config as settings
from build import choose_device, config_of, machine_name, precision_name, training_dtype
from cifar10 import DataError
from conditional_diffusion.checkpoint import (
    CheckpointError,
    expected_bytes,
    list_checkpoints,
    load_newest,
    require_classes,
    require_space,
)
from conditional_diffusion.memory import OutOfMemory
from conditional_diffusion.processes import Processes
from conditional_diffusion.training_engine import TrainingDiverged
from config import AUTO_BATCH, CLASS_NAMES, Config, ConfigError
from data import load_splits
from report import write_report
from run_directory import LOCK, RUN_DIRECTORIES, RunInUse, claim, read_json, read_records, sweep
from training_monitor import TrainingMonitor, progress, say
from training_run import Run

FIXED = ("model.", "diffusion.", "data.", "train.seed", "train.batch_size",
         "train.optimizer")  # for a whole run
MOST_TIMES = 4  # the epochs of overfitting one image, beyond which they are for the user to ask for
TIME_LIMIT_STATUS = 75  # "try again later" of sysexits.h, for schedulers that requeue
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last of a closed terminal
# make, launchers and schedulers hand on a signal that the process may have got by itself already.
SAME_REQUEST_SECONDS = 2
USER_ERRORS = (ConfigError, CheckpointError, DataError, OutOfMemory, RunInUse, TrainingDiverged)


def parse_arguments():
    parser = cli.Parser(description=__doc__.split("\n\n")[0])
    mode = parser.add_mutually_exclusive_group(required=True)
    for name, preset in settings.PRESETS.items():
        mode.add_argument(
            f"--{name}", dest="mode", action="store_const", const=name, help=preset.__doc__
        )
    parser.add_argument(
        "--samples", metavar="N", help="training images per class (overfit: 1 unless given)"
    )
    parser.add_argument(
        "--fresh", action="store_true",
        help="start anew; an existing run is moved aside, a demo or quick-test replaced",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the config of a new run as JSON and stop"
    )
    cli.add_config_flags(parser)
    return parser.parse_args()


def resolve_config(mode: str, overrides: dict, saved: Config | None) -> Config:
    """The preset, or the config of the run to continue, plus overrides.

    Raises ConfigError, listing the settings, where an override would make another run of the
    saved one: its model, diffusion and data sections, its seed, batch size and
    optimizer are fixed.
    """
    preset = settings.PRESETS[mode]()
    if saved is None:
        config = settings.apply_overrides(preset, overrides)
        if mode == "overfit":
            # Images of one class can be told apart by the noise alone, which takes longer to learn.
            epochs = preset.train.epochs * min(config.data.samples_per_class, MOST_TIMES)
            config = settings.apply_overrides(config, {"train.epochs": epochs, **overrides})
        return config
    if str(overrides.get("train.batch_size")) in ("auto", str(AUTO_BATCH)):
        # It was chosen when the run began.
        overrides = {k: v for k, v in overrides.items() if k != "train.batch_size"}
    # These two belong to a session on a machine, not to the run.
    session = {"train.device": preset.train.device, "train.max_hours": preset.train.max_hours}
    config = settings.apply_overrides(saved, session | overrides)
    free = {"data.data_dir", "data.skip_unreadable"}  # may change without changing the model
    conflicts = {
        name: values for name, values in settings.differences(saved, config).items()
        if name.startswith(FIXED) and name not in free
    }
    if conflicts:
        listed = ", ".join(f"{name} {old} (now {new})" for name, (old, new) in conflicts.items())
        if "data.dataset" in conflicts and os.environ.get("DATA_DIR"):
            listed += " by DATA_DIR"
        raise ConfigError(
            f"the run in {RUN_DIRECTORIES[mode]} was started with {listed}; drop the change to "
            "continue it, or start anew with --fresh (make: FRESH=1)"
        )
    return config


def changes(config: Config, saved: Config) -> str:
    """What a continued run does differently from here on, to be added to a sentence."""
    changed = settings.differences(saved, config)
    listed = ", ".join(f"{name} {new} (was {old})" for name, (old, new) in changed.items())
    return f", now with {listed}" if listed else ""


def load_data(config: Config, may_fall_back: bool):
    """(config, splits); without any data a small new run falls back to the pictograms, aloud."""
    arguments = {"seed": config.train.seed, "progress": progress, "say": say}
    if config.data.dataset == "pictograms" and config.data.data_dir:
        say(f"the pictures of {config.data.data_dir} are not used: this run learns the built-in "
            "pictograms")
    try:
        return config, load_splits(config.data, **arguments)
    except DataError as error:
        if config.mode in ("full", "demo") or not may_fall_back or config.data.data_dir:
            raise
        say(str(error))
        say("falling back to the built-in pictograms")
    config = replace(config, data=replace(config.data, dataset="pictograms"))
    return config, load_splits(config.data, **arguments)


def newest_checkpoint(mode: str, folder: Path) -> dict | None:
    """The checkpoint to continue from; None where the command promises a run of its own.

    A quick-test always starts anew, and so does a complete overfit or demo run: they take minutes.
    """
    if mode == "quick-test":
        return None
    found = load_newest([folder], warn=say)
    if found is None:
        if list_checkpoints(folder):
            raise CheckpointError(
                f"no checkpoint in {folder} can be read, for the reasons above; mend that, or "
                "start anew with --fresh (make: FRESH=1)"
            )
        return None
    path, state = found
    if state["config"]["mode"] != mode:
        raise CheckpointError(
            f"{path} belongs to a run of mode {state['config']['mode']}, not {mode}; move it away "
            "or start anew with --fresh (make: FRESH=1)"
        )
    if mode != "full" and state["step"] >= state["total_steps"] and has_finished(folder):
        return None
    require_classes(path, state["class_names"], CLASS_NAMES)
    return state


def clear_away(mode: str, folder: Path) -> None:
    """Make room for a new run: a demo or quick-test is replaced, any other run moved aside.

    The lock stays, as does a run of another mode below the folder. What is left of a run whose
    checkpoints were removed is moved too: its scores and grids are not the new run's.
    """
    if not (list_checkpoints(folder) or read_records(folder / "metrics.jsonl")):
        return
    stays = {LOCK, *(path.name for path in RUN_DIRECTORIES.values() if path != folder)}
    entries = [entry for entry in folder.iterdir() if entry.name not in stays]
    if mode in ("quick-test", "demo"):
        for entry in entries:
            real_folder = entry.is_dir() and not entry.is_symlink()
            shutil.rmtree(entry) if real_folder else entry.unlink()
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}_{number}")).exists():
        number += 1
    aside.mkdir()
    for entry in entries:
        shutil.move(entry, aside / entry.name)  # a linked folder may lie on another disk
    say(f"the earlier run was moved to {aside}")


def clear_away_once(mode: str, folder: Path) -> None:
    """clear_away, unless launch.py has started us again and what is there is this run's own."""
    launched = os.environ.get(cli.LAUNCH_FOLDER)
    if launched and has_cleared_away():
        return
    clear_away(mode, folder)
    if launched:
        Path(launched, cli.CLEARED).touch()


def has_cleared_away() -> bool:
    """Whether this is a restart, after a process has died, and the run there is its own already."""
    if cli.LAUNCH_FOLDER in os.environ:
        return Path(os.environ[cli.LAUNCH_FOLDER], cli.CLEARED).exists()
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # torchrun knows no more


@contextmanager
def stopping_on_signals(run: Run):
    """The first of STOP_SIGNALS ends the run after its current step; a later one at once."""
    asked_at = -math.inf

    def request_stop(number, frame):
        nonlocal asked_at
        if time.monotonic() < asked_at + SAME_REQUEST_SECONDS:
            return
        if run.stop_signal:
            raise KeyboardInterrupt
        asked_at, run.stop_signal = time.monotonic(), number
        say("stopping after this step; the run will be saved (once more: stop at once)")

    under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    earlier = {number: signal.signal(number, request_stop) for number in STOP_SIGNALS
               if number != signal.SIGHUP or not under_nohup}
    try:
        yield
    finally:
        # Who was asked to stop may be asked again until it has ended, as by a launcher that is
        # killed: the end of each of its threads may be told to its processes.
        for number, handler in earlier.items() if not run.stop_signal else ():
            signal.signal(number, handler)


def has_finished(folder: Path) -> bool:
    """Whether a run came to its end, beyond its last step: grids, curves and all."""
    return read_json(folder / "run.json").get("state") == "finished"


def say_complete(run: Run) -> None:
    """Say so, and write the report anew, whose writer may have been killed."""
    say(f"the run in {run.folder} is complete ({run.engine.step} steps); EPOCHS= makes it longer, "
        "FRESH=1 starts anew, `make generate` draws from it")
    if run.processes.leads:
        sweep(run.folder)
        say(f"report: {write_report(run.folder)}")


def describe(run: Run, device) -> str:
    config, engine = run.config, run.engine
    parameters = sum(parameter.numel() for parameter in run.model.parameters()) / 1e6
    precision = precision_name(engine.autocast_dtype)
    where = device_name(device, run.processes)
    return (
        f"{config.mode} run: U-Net of {parameters:.1f} M parameters at {config.data.image_size}x"
        f"{config.data.image_size}, {len(run.splits['train'])} images, batch "
        f"{run.batches.batch_size}, {engine.total_steps} steps, {where}, {precision}"
    )


def device_name(device, processes: Processes) -> str:
    if not processes.several:
        return str(device)
    return f"{device.type} in {processes.world_size} processes"


def require_equal_devices(config: Config, device, processes: Processes) -> None:
    """ConfigError where a process would train otherwise than the one that leads: steps must match.
    """
    own = f"{device.type} in {precision_name(training_dtype(config, device))}"
    leaders = processes.from_leader(lambda: own)
    if own != leaders:
        raise ConfigError(
            f"process {processes.rank} would train on {own}, the first one on {leaders}; all need "
            "one kind of device (make: DEVICE=) and one precision, as with --train.precision fp32"
        )


def require_a_gpu_again(
    config: Config, device, saved: dict | None, folder: Path, processes: Processes
) -> None:
    """ConfigError where a run that a GPU began would go on on the CPU, without having been told."""
    before = processes.from_leader(lambda: str(read_json(folder / "run.json").get("device")))
    untold = (config.train.device, device.type) == ("auto", "cpu")
    if saved and untold and before.startswith("cuda"):
        raise ConfigError(
            f"the run in {folder} was trained on a GPU, and torch finds none now; `make "
            "gpu-status` tells why, --device cpu (make: DEVICE=cpu) continues on the CPU"
        )


def require_equal_data(found: str, saved: dict | None, folder: Path, processes: Processes) -> None:
    """DataError where the pictures of this fingerprint are not the leader's, or not the run's."""
    if found != processes.from_leader(lambda: found):
        raise DataError(f"process {processes.rank} has other pictures than the first one; every "
                        "machine needs the same data")
    if saved and saved.get("data", found) != found:  # earlier versions did not save it
        raise DataError(
            f"the run in {folder} was started with other pictures than those found now; set "
            "DATA_DIR to where those are, or start anew with --fresh (make: FRESH=1)"
        )


def main() -> int:
    args = parse_arguments()
    overrides = cli.config_overrides(args)
    if args.samples is not None:
        overrides["data.samples_per_class"] = cli.parse_whole("--samples", args.samples)
    if "data.data_dir" in overrides and args.mode != "demo":
        overrides.setdefault("data.dataset", "cifar10")
    if args.dry_run:
        print(json.dumps(settings.to_dict(resolve_config(args.mode, overrides, None)), indent=1))
        return 0

    folder, processes = RUN_DIRECTORIES[args.mode], cli.join_processes()
    fresh = args.fresh and not has_cleared_away()
    # From here on: `make clean` must not take what is being read.
    lock = claim(folder) if processes.leads else None
    saved = processes.from_leader(lambda: None if fresh else newest_checkpoint(args.mode, folder))
    saved_config = config_of(saved, f"the run in {folder}") if saved else None
    config = resolve_config(args.mode, overrides, saved_config)
    device = choose_device(config, processes)
    require_equal_devices(config, device, processes)
    require_a_gpu_again(config, device, saved, folder, processes)
    may_fall_back = saved is None and "data.dataset" not in overrides
    config, splits = load_data(config, may_fall_back)
    run = Run(config, folder, splits, device, saved, processes)
    require_equal_data(run.fingerprint, saved, folder, processes)
    engine = run.engine
    if engine.complete and processes.from_leader(lambda: has_finished(folder)):
        say_complete(run)
        return 0
    if not processes.leads:
        return session(run)
    again = [word for word in sys.argv if word != "--fresh"]
    command = os.environ.get(cli.COMMAND) or shlex.join([sys.executable, *again])
    with TrainingMonitor(
        folder, mode=config.mode, device=device_name(device, processes),
        machine=machine_name(device), total_steps=engine.total_steps,
        steps_per_epoch=run.batches.steps_per_epoch, command=command, lock=lock,
    ) as run.monitor:
        if saved is None:
            clear_away_once(args.mode, folder)
        say(describe(run, device))
        if config.train.warmup_steps >= engine.total_steps:
            say(f"the whole run lies within the {config.train.warmup_steps} steps of its warm-up; "
                "with a smaller train.warmup_steps it learns more")
        say(f"results: {folder}/ (curves, samples, checkpoints); Ctrl-C stops; make status tells")
        if saved:
            say(f"continuing at step {engine.step}{changes(run.config, saved_config)}")
        require_space(folder, expected_bytes(run.model))
        status = session(run)
    if status not in (0, 1):  # interrupted
        hint = "it starts anew next time" if args.mode == "quick-test" else (
            f"the same command without --fresh continues: {command}")
        say(f"stopped and saved at step {engine.step}; {hint}")
    say(f"report: {write_report(folder)}; next: make generate")
    return status


def session(run: Run) -> int:
    """Train to the end or a signal; returns the exit status, 1 for a verdict that fails."""
    if run.monitor:
        run.monitor.begin(run.engine.step, settings.to_dict(run.config))
        run.draw_originals()
    with stopping_on_signals(run):
        complete = run.train()
    if not complete:
        # A signal need not have reached every process.
        number = run.processes.extreme(run.stop_signal, largest=True)
        return 128 + number if number else TIME_LIMIT_STATUS
    return 0 if run.config.mode != "overfit" or run.verdict() else 1


if __name__ == "__main__":
    cli.exit_with(main, USER_ERRORS)

"""Find or download CIFAR-10, check it and prepare it for training (`make data`)."""

from command_line import Parser, add_config_flags, config_overrides, exit_with

import config as settings
from cifar10 import DataError, prepare
from config import ConfigError
from training_monitor import progress, say

USER_ERRORS = (ConfigError, DataError)
PREPARATION_SETTINGS = ("data.data_dir", "data.image_size", "data.skip_unreadable")


def main() -> int:
    parser = Parser(description=__doc__)
    add_config_flags(parser, PREPARATION_SETTINGS)
    config = settings.apply_overrides(settings.full(), config_overrides(parser.parse_args()))
    prepare(config.data, progress=progress, say=say)
    return 0


if __name__ == "__main__":
    exit_with(main, USER_ERRORS)

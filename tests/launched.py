"""What `accelerate launch` starts in a test: a process that says how it was started."""

import sys


def main() -> None:
    from hybridrl_lib.system import processes as distributed
    from hybridrl_lib.system.errors import UsageError

    try:
        distributed.begin("cpu")
    except UsageError as error:
        sys.exit(f"hybridrl: {error}")
    # One write: the launcher's processes are not buffered, and their pieces would mix.
    sys.stdout.write(f"process {distributed.rank()} of {distributed.size()} shards "
                     f"{distributed.wants_shards()}\n")
    distributed.end()


if __name__ == "__main__":
    main()

"""What `accelerate launch` starts in a test: a process that says how it was started."""

import sys


def main() -> None:
    from hybridrl_lib.system import processes
    from hybridrl_lib.system.errors import UsageError

    try:
        processes.begin("cpu")
    except UsageError as error:
        sys.exit(f"hybridrl: {error}")
    # One write: the launcher's processes are not buffered, and their pieces would mix.
    sys.stdout.write(f"process {processes.rank()} of {processes.size()}\n")
    processes.end()


if __name__ == "__main__":
    main()

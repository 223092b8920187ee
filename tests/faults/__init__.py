"""Runs that are hit by a fault at a random moment, started again, and compared byte by byte.

    python tests/faults --trials 120 --seed 0        # ten to twenty minutes of one core
    python tests/faults --each-once                  # every kind of fault once; pytest runs this

Every trial is a real run of the shipped tiny model: a process that trains, is hit, and is followed
by the same command until the run is complete. Its record (except times), answers, and weights must
then be those of an uninterrupted run. Until then no damaged file may be read as complete, and
nothing that was finished may change. Runs are forked from one process that has imported everything;
notebooks have their own kernels.

Signals are signals. A power cut is a kill after which everything that was not synced is undone, in
part or completely (`power.py`). A full disk is a small tmpfs, a limit on the size of files, or an
error at a random operation; a read-only folder is a bind mount or such an error (chmod does not
limit root). Mounts need root or user namespaces; without them only the errors are used, and the
summary says so.
"""

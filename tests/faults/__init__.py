"""Runs that are struck by a fault at a random moment, started again, and compared to the byte.

    python tests/faults --trials 120 --seed 0        # ten to twenty minutes of one core
    python tests/faults --each-once                  # every kind of fault once; pytest runs this

Every trial is a real run of the shipped tiny model: a process that trains, is struck, and is
followed by the same command again until the run is complete. Its record (times aside), answers and
weights must then be those of a run that nothing happened to; until then no file may read as whole
that is not, and nothing that was finished may change. Runs are forked from one process that has
imported everything; notebooks are kernels of their own.

What a fault is made of: signals are signals. A power cut is a kill after which everything that was
not synced is taken back, in part or in whole (`power.py`). A full disk is, by turns, a small tmpfs,
a limit on the size of files, and an error at a random operation; a read-only folder is a bind mount
or such an error (root is not bound by chmod). Mounts need root or user namespaces; without them the
errors remain, and the summary says so.
"""

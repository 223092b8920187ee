"""Runs that are hit by a fault at a random moment, started again, and compared byte by byte.

    python tests/faults --trials 120 --seed 0        # ten to twenty minutes of one core
    python tests/faults --each-once                  # every kind of fault once; pytest runs this

A trial is a run of the shipped tiny model that is hit and followed by the same command until it is
complete. Its record (except times), answers, and weights must then be those of an uninterrupted
run. Until then no damaged file may be read as complete, and nothing finished may change. Mounts
(full disks, read-only folders) need root or user namespaces; without them only errors are used.
"""

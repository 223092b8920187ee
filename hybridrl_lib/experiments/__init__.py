"""One run or many, on this machine or on a cluster.

A function that has the name of its file, such as `run`, is imported from there or from
`hybridrl_lib`.
"""

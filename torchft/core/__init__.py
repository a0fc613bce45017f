"""Pure decisions: no I/O, no torch, no clock, no threads.

Each module holds one state machine. Its methods take an event and ``now`` (seconds on any clock that does not go
back), change only the machine itself, and return one plain value that says everything the shell has to do. So
every rule and every timeout is a unit test that does not wait.
"""
